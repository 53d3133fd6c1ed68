"""What a kernel that can fail tells its launch: a record behind its arguments, and the exception that is made of it.

`lowering/failures.py` says what lies there.
"""

import ctypes

import torch

from ..launch import LaunchPlan
from .lowering.failures import RECORD


class Record:
    """The memory that the first failure of a launch fills."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(RECORD.size)
        self.address = ctypes.addressof(self._memory)

    def raise_failure(self, plan: LaunchPlan) -> None:
        """Raises what has failed, if something has. The kernel's code must still be in memory."""
        claimed, text, address, *program = RECORD.unpack(self._memory.raw)
        if not claimed:
            return
        kind, place, detail = ctypes.string_at(text).decode().split("\n", 2)
        if kind == "assert":
            raise AssertionError(f"{place}: {detail or 'assertion failed'} (program {tuple(program)})")
        name = min(detail.split(" or "), key=lambda name: _distance(plan.arguments[name], address))
        tensor = plan.arguments[name]
        raise IndexError(
            f"{place}: element {(address - tensor.data_ptr()) // tensor.element_size()} is outside the memory of {name}, "
            f"which has {_length(tensor)} elements (program {tuple(program)})"
        )


def _length(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return last + 1 if tensor.numel() else 0


def _distance(tensor: torch.Tensor, address: int) -> int:
    """Bytes from the tensor's memory to an address outside."""
    begin = tensor.data_ptr()
    return max(begin - address, address - begin - _length(tensor) * tensor.element_size())
