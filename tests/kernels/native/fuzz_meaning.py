"""What the source of a kernel means, by PyTorch: `tl` as an eager language of one program.

    run(source, name, arguments)      the same source, on the tensors that a launch would be given

Triton's own interpreter says the same of these kernels wherever it can: it multiplies raw bits of bfloat16, knows no constants
of it, its loops count in Python's integers, and it runs only what was defined under TRITON_INTERPRET.
"""

from types import SimpleNamespace
from typing import Any

import torch

UINT32 = "uint32"  # held in 64 bits


class Block(torch.Tensor):
    """A tile, or a scalar: integers divide towards zero."""

    def __floordiv__(self, other: Any) -> Any:
        return torch.div(self, other, rounding_mode="trunc")

    def __mod__(self, other: Any) -> Any:
        return torch.fmod(self, other)

    def to(self, kind: Any) -> Any:
        return super().to(torch.int64) & 0xFFFFFFFF if kind is UINT32 else super().to(kind)


def block(x: Any, dtype: torch.dtype | None = None) -> Any:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Block)


class Pointer:
    def __init__(self, memory: torch.Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, offsets

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.offsets + more)

    def inside(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Where it points to, and which elements a mask lets through."""
        offsets = torch.as_tensor(self.offsets)
        return offsets.long(), torch.as_tensor(True if mask is None else mask).expand(offsets.shape)


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    offsets, inside = pointer.inside(mask)
    found = pointer.memory[torch.where(inside, offsets, 0)]
    return block(torch.where(inside, found, torch.as_tensor(other, dtype=found.dtype)))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offsets, inside = pointer.inside(mask)
    value = torch.as_tensor(value, dtype=pointer.memory.dtype)
    pointer.memory[offsets[inside]] = value.expand(offsets.shape)[inside]


def _atomic(combine: Any) -> Any:
    def atomic(pointer: Pointer, value: Any, mask: Any = None) -> Any:
        offsets, inside = pointer.inside(mask)
        before = block(torch.zeros(offsets.shape, dtype=pointer.memory.dtype))
        for place in inside.nonzero().tolist():  # one element after the other: places may repeat
            at = tuple(place)
            before[at] = pointer.memory[offsets[at]]
            pointer.memory[offsets[at]] = combine(before[at], torch.as_tensor(value).expand(offsets.shape)[at])
        return before

    return atomic


def _two(function: Any) -> Any:
    def apply(x: Any, y: Any) -> Any:
        like = x if isinstance(x, torch.Tensor) else y
        return function(torch.as_tensor(x, dtype=like.dtype), torch.as_tensor(y, dtype=like.dtype))

    return apply


def _wide(x: Any) -> Any:
    return x.to(torch.float32 if x.is_floating_point() else torch.int32) if x.element_size() < 4 else x


def _sum(x: Any, axis: int | None = None, keep_dims: bool = False) -> Any:
    x = x if x.dtype == torch.float16 else _wide(x)
    return x.sum(dtype=x.dtype) if axis is None else x.sum(axis, keepdim=keep_dims, dtype=x.dtype)


def _extreme(name: str, *, index: bool) -> Any:
    def extreme(x: Any, axis: int | None = None, keep_dims: bool = False, return_indices: bool = False) -> Any:
        if axis is None:
            return getattr(_wide(x), f"a{name}")()
        best = getattr(_wide(x), f"a{name}")(axis, keepdim=True)
        place = (_wide(x) == best).to(torch.int32).argmax(axis, keepdim=True).to(torch.int32)  # of equal ones the first
        best, place = (each if keep_dims else each.squeeze(axis) for each in (best, place))
        if return_indices:
            return (best if x.dtype == torch.bfloat16 else best.to(x.dtype)), place
        return place if index else best

    return extreme


def _cumsum(x: Any, axis: int, reverse: bool = False) -> Any:
    x = x if x.dtype == torch.float16 else _wide(x)
    y = x.flip(axis) if reverse else x
    y = y.cumsum(axis, dtype=x.dtype)
    return y.flip(axis) if reverse else y


def _dot(x: Any, y: Any, z: Any = 0, **options: Any) -> Any:
    return _wide(x) @ _wide(y) + z


LANGUAGE = SimpleNamespace(
    float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, int1=torch.bool, int8=torch.int8, int16=torch.int16, int32=torch.int32,
    int64=torch.int64, uint8=torch.uint8, uint32=UINT32, arange=lambda low, high: block(torch.arange(low, high, dtype=torch.int32)),
    load=_load, store=_store, atomic_add=_atomic(lambda x, y: x + y), atomic_max=_atomic(torch.maximum), atomic_min=_atomic(torch.minimum),
    atomic_and=_atomic(lambda x, y: x & y), atomic_or=_atomic(lambda x, y: x | y), atomic_xor=_atomic(lambda x, y: x ^ y), atomic_xchg=_atomic(lambda x, y: y),
    minimum=_two(torch.minimum), maximum=_two(torch.maximum), abs=torch.abs, floor=torch.floor, debug_barrier=lambda: None,
    where=lambda condition, x, y: block(torch.where(torch.as_tensor(condition), x, y)), sum=_sum, max=_extreme("max", index=False), min=_extreme("min", index=False),
    argmax=_extreme("max", index=True), argmin=_extreme("min", index=True), cumsum=_cumsum, gather=lambda x, index, axis: x.gather(axis, index.long()),
    trans=lambda x: x.T, permute=lambda x, order: x.permute(order), reshape=lambda x, shape: x.reshape(shape), join=lambda x, y: torch.stack((x, y), -1),
    split=lambda x: x.unbind(-1), interleave=lambda x, y: torch.stack((x, y), -1).flatten(-2), flip=lambda x, axis: x.flip(axis),
    dot=_dot,
)  # fmt: skip


def run(source: str, name: str, arguments: tuple[Any, ...]) -> None:
    """Runs the kernel of this name on tensors and one integer, which comes last."""
    scope = {
        "tl": LANGUAGE,
        "triton": SimpleNamespace(jit=lambda function: function),
        "range": lambda *bounds: (block(i, torch.int32) for i in range(*map(int, bounds))),
    }
    exec(source, scope)  # only the kernel: what stands above and below it is for a launch
    scope[name](*map(Pointer, arguments[:-1]), block(arguments[-1], torch.int32))
