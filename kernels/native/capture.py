"""What a function launches, as a recording: what `torch.cuda.graph` is to a GPU.

    outputs, recording = record(lambda: model(x))      runs it once
    x.copy_(another)
    recording.replay()                                 and outputs are those of another

Tensors are where they were: a replay reads and writes the memory that the function read and wrote, and all that it allocated
stays with the recording. So whatever it does must be launches, views and allocations. An operator of PyTorch's would be
missing from a replay without a word: it is an error when it is recorded. What the host reads of a tensor (`tolist`, `numpy`) is
what it was when it was recorded, and arguments are checked then, too, and not at a replay.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from ..torch_compat import LightDispatchMode
from .compiled import recording
from .recorded import Recording

ALLOCATIONS = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip

_Result = TypeVar("_Result")

# where memory was allocated since `record` began
_allocated: ContextVar[set[int] | None] = ContextVar("allocated", default=None)


class NotRecordableError(RuntimeError):
    """What was to be recorded does more than launch kernels."""


class OnlyLaunches(LightDispatchMode):
    """Refuses what a replay would leave out. (An op of ours is entered without this mode, and takes it on again.)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "llama_fast" and func not in ALLOCATIONS and not _is_view(func, args, result):
            raise NotRecordableError(f"{func} is not a Triton kernel: a replay would leave it out")
        if func in ALLOCATIONS and (allocated := _allocated.get()) is not None:
            allocated.add(_memory(result))
        return result


def _is_view(func: Any, args: Any, result: Any) -> bool:
    """By what came of it: `contiguous` and `to`, which may copy, call themselves views."""
    if not func.is_view:
        return False
    results = result if isinstance(result, list | tuple) else [result]
    return all(_memory(each) == _memory(args[0]) for each in results)


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def record(function: Callable[[], _Result]) -> tuple[_Result, Recording]:
    """Runs `function`, and returns its result with a recording of its launches.

    Raises `NotRecordableError` where it does anything else, launches a kernel that can fail, or there are no native kernels.
    """
    from ..cpu import recorded_by_name, why_not_native

    if reason := why_not_native():
        raise NotRecordableError(f"no native kernels: {reason}")
    allocated: set[int] = set()
    token = _allocated.set(allocated)
    try:
        with recorded_by_name(), recording() as launches, OnlyLaunches():
            result = function()
    finally:
        _allocated.reset(token)
    if failing := next((plan for kernel, plan in launches if kernel.can_fail), None):
        raise NotRecordableError(f"{failing.kernel.__name__} can fail, and a replay would not say so")
    stages = [[kernel.launch_of(plan, in_region=True)] for kernel, plan in launches]
    arguments = [plan.arguments for _, plan in launches]
    storages = [x.untyped_storage() for each in arguments for x in each.values() if isinstance(x, torch.Tensor)]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() in allocated}
    return result, Recording(stages, keep=arguments, kept_bytes=sum(held.values()))
