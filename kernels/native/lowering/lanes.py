"""Lane values: what is known of an expression over neighbouring elements of a tile, before any vector is made of it.

A loop over a tile's row evaluates its expressions for `width` elements at once, the lanes. Most of what a kernel computes
is addresses and masks, and these are simple in the lane's number l:

    Uniform(x)          x in every lane                  row_start + 3
    Affine(base, s)     base + s * l, 64 bits wide       row_start + tl.arange(0, N), and pointers made of it
    Prefix(n)           l < n, a boolean                 row_start + tl.arange(0, N) < N
    Vector(x)           an LLVM vector                   what was loaded, and all that is computed from it

Kept so, `tl.load(p + tl.arange(0, N), mask=tl.arange(0, N) < n)` is a plain vector load in a loop up to n / width and one
masked load after it, where a vector of pointers and a vector of booleans would be a gather.

An affine lane value of 32 bits is computed in 64, and cut to 32 where a vector is made of it: so it wraps around as it
must. Only where it is an address, or is compared, it is used as it is (`Use`).
"""

from dataclasses import dataclass
from enum import Enum

from .builder import Builder
from .elements import Operand, is_pointer, literal, llvm_type, pointee, splat_literal, vector_type, wrapped


@dataclass(frozen=True, slots=True)
class Uniform:
    x: Operand


@dataclass(frozen=True, slots=True)
class Affine:
    """Of integers, or of a pointer (`base` is one, `stride` counts elements)."""

    base: Operand
    stride: Operand


@dataclass(frozen=True, slots=True)
class Prefix:
    """True in lanes below `count`, which may be negative or larger than the number of lanes."""

    count: Operand


@dataclass(frozen=True, slots=True)
class Vector:
    """An LLVM value of `width` lanes (a scalar where that is 1)."""

    x: str


Lane = Uniform | Affine | Prefix | Vector


class Use(Enum):
    """What an integer is asked for, which decides what becomes of one of 32 bits that is widened to 64."""

    VALUE = "value"  # each lane wraps around: no longer affine
    BOUND = "bound"  # of a comparison: the first lane wraps around, and the others lie beside it
    ADDRESS = "address"  # none does: what an address overflows to is no address


def as_vector(b: Builder, lane: Lane, element: str, width: int) -> str:
    """The lane value as LLVM value of `width` lanes; at width 1 a scalar, which may be a literal."""
    if isinstance(lane, Vector):
        return lane.x
    if isinstance(lane, Uniform):
        if isinstance(lane.x, str):
            return b.splat(lane.x, element, width)
        return splat_literal(lane.x, element, width)
    if isinstance(lane, Prefix):
        return _prefix_mask(b, lane.count, width)
    return _affine_vector(b, lane, element, width)


def _prefix_mask(b: Builder, count: Operand, width: int) -> str:
    if width == 1:
        return b.let(f"icmp sgt i64 {count}, 0")
    inside = _spread(b, narrow(b, b.clamp(count, 0, width), "i32"), "i32", width)
    return b.let(f"icmp slt <{width} x i32> {iota('i32', width)}, {inside}")


def _affine_vector(b: Builder, lane: Affine, element: str, width: int) -> str:
    if is_pointer(element):
        if width == 1:
            return str(lane.base)
        offsets = b.let(f"mul <{width} x i64> {_spread(b, lane.stride, 'i64', width)}, {iota('i64', width)}")
        return b.let(f"getelementptr {memory_type(element)}, ptr {lane.base}, <{width} x i64> {offsets}")
    base = narrow(b, lane.base, element)
    if width == 1:
        return literal(base, element)
    kind = vector_type(element, width)
    steps = iota(element, width)
    if lane.stride != 1:
        steps = b.let(f"mul {kind} {_spread(b, narrow(b, lane.stride, element), element, width)}, {steps}")
    return b.let(f"add {kind} {_spread(b, base, element, width)}, {steps}")


def _spread(b: Builder, x: Operand, element: str, width: int) -> str:
    return b.splat(x, element, width) if isinstance(x, str) else splat_literal(x, element, width)


def memory_type(pointer: str) -> str:
    """What a pointer's elements are called in an address computation: booleans are bytes."""
    element = pointee(pointer)
    return "i8" if element == "i1" else llvm_type(element)


def iota(element: str, width: int) -> str:
    return "<" + ", ".join(f"{element} {i}" for i in range(width)) + ">"


def narrow(b: Builder, x: Operand, element: str) -> Operand:
    """A 64-bit integer as one of `element`."""
    if not isinstance(x, str):
        bits = int(element[1:])
        return wrapped(int(x), bits) if bits > 1 else int(x) & 1
    return x if element == "i64" else b.let(f"trunc i64 {x} to {element}")


def widen(b: Builder, lane: Lane, element: str, width: int) -> Lane:
    """A signed integer lane value in 64 bits; an affine one has them already."""
    if element == "i64" or isinstance(lane, Affine):
        return lane
    if isinstance(lane, Uniform):
        return lane if not isinstance(lane.x, str) else Uniform(b.let(f"sext {element} {lane.x} to i64"))
    kind = vector_type(element, width)
    return Vector(b.let(f"sext {kind} {as_vector(b, lane, element, width)} to {vector_type('i64', width)}"))


def as_affine(b: Builder, lane: Lane, element: str) -> Affine | None:
    """Base and stride of an integer lane value that has them, in 64 bits."""
    if isinstance(lane, Affine):
        return lane
    if isinstance(lane, Uniform):
        wide = widen(b, lane, element, 1)
        assert isinstance(wide, Uniform)
        return Affine(wide.x, 0)
    return None


def offset_pointer(b: Builder, pointer: Lane, offset: Lane, element: str, width: int) -> Lane:
    """`pointer + offset` elements; `element` is the pointer's type, the offset has 64 bits."""
    kind = memory_type(element)

    def moved(base: Operand, by: Operand) -> Operand:
        return base if by == 0 else b.let(f"getelementptr {kind}, ptr {base}, i64 {by}", "p")

    if isinstance(pointer, Uniform | Affine) and isinstance(offset, Uniform | Affine):
        base, stride = (pointer.x, 0) if isinstance(pointer, Uniform) else (pointer.base, pointer.stride)
        by, step = (offset.x, 0) if isinstance(offset, Uniform) else (offset.base, offset.stride)
        total = b.add(stride, step)
        return Uniform(moved(base, by)) if total == 0 else Affine(moved(base, by), total)
    steps = as_vector(b, offset, "i64", width)
    if isinstance(pointer, Uniform):
        return Vector(b.let(f"getelementptr {kind}, ptr {pointer.x}, {vector_type('i64', width)} {steps}"))
    bases = as_vector(b, pointer, element, width)
    return Vector(
        b.let(f"getelementptr {kind}, {vector_type(element, width)} {bases}, {vector_type('i64', width)} {steps}")
    )
