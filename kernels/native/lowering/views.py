"""Views: splat, broadcast, expand_dims, trans, reshape, split and join compute nothing, they only change the index.

%w = tt.expand_dims %v {axis = 0}        at (i, j)   ->   v at (j,)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..ttir import Op, Value
from .builder import Builder
from .elements import vector_type
from .index import Coordinates, Index
from .lanes import Affine, Lane, Uniform, Vector, as_vector

if TYPE_CHECKING:
    from .tiles import Tiles

VIEWS = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape", "tt.split", "tt.join"}
MOVES = (VIEWS | {"tt.gather"}) - {"tt.splat"}
"""Ops whose result has elements of their operand at other places."""


def _splat(tiles: "Tiles", op: Op, value: Value, at: Index) -> Coordinates:
    return ()


def _broadcast(tiles: "Tiles", op: Op, value: Value, at: Index) -> Coordinates:
    shape = op.operands[0].shape
    return tuple(c if size > 1 else Uniform(0) for size, c in zip(shape, at.coordinates, strict=True))


def _expand_dims(tiles: "Tiles", op: Op, value: Value, at: Index) -> Coordinates:
    axis = op.attributes["axis"]
    return at.coordinates[:axis] + at.coordinates[axis + 1 :]


def _transpose(tiles: "Tiles", op: Op, value: Value, at: Index) -> Coordinates:
    order = op.attributes["order"]
    return tuple(at.coordinates[order.index(dimension)] for dimension in range(len(order)))


def _split(tiles: "Tiles", op: Op, value: Value, at: Index) -> Coordinates:
    return (*at.coordinates, Uniform(value.position))


def _reshape(tiles: "Tiles", op: Op, value: Value, at: Index) -> Coordinates:
    """Through the element's number: it is taken apart by the source's shape. Lanes must not carry into a dimension."""
    b, shape = tiles.b, op.operands[0].shape
    if shape == value.shape:
        return at.coordinates
    linear = tiles.linear(value.shape, at.coordinates, at.width)
    base, stride = (linear.base, linear.stride) if isinstance(linear, Affine) else (None, 0)
    if isinstance(linear, Uniform):
        base = linear.x
    if base is None or not isinstance(stride, int):
        return _reshape_lanes(b, shape, as_vector(b, linear, "i64", at.width), at.width)
    coordinates: list[Lane] = []
    for size in reversed(shape[1:]):
        if stride % size == 0:
            coordinates.append(Uniform(b.rem(base, size)))
            stride //= size
        elif size % (stride * at.width) == 0:  # the lanes lie within one row
            coordinates.append(Affine(b.rem(base, size), stride))
            stride = 0
        else:
            return _reshape_lanes(b, shape, as_vector(b, linear, "i64", at.width), at.width)
        base = b.div(base, size)
    coordinates.append(Uniform(base) if stride == 0 else Affine(base, stride))
    return tuple(reversed(coordinates))


def _reshape_lanes(b: Builder, shape: tuple[int, ...], number: str, width: int) -> Coordinates:
    """Where lanes cross rows of the source: each dimension's coordinate as a vector."""
    kind = vector_type("i64", width)
    coordinates: list[Lane] = []
    for size in reversed(shape):
        divisor = as_vector(b, Uniform(size), "i64", width)
        coordinates.append(Vector(b.let(f"urem {kind} {number}, {divisor}")) if size > 1 else Uniform(0))
        number = b.let(f"udiv {kind} {number}, {divisor}")
    return tuple(reversed(coordinates))


SOURCE_COORDINATES: dict[str, Callable[["Tiles", Op, Value, Index], Coordinates]] = {
    "tt.splat": _splat,
    "tt.broadcast": _broadcast,
    "tt.expand_dims": _expand_dims,
    "tt.trans": _transpose,
    "tt.split": _split,
    "tt.reshape": _reshape,
}


def joined(reshape: Op) -> Op:
    source = reshape.operands[0].op
    assert source is not None
    return source


def is_interleaving(op: Op, at: Index) -> bool:
    """Whether this is reshape(join(a, b)) to a last dimension with a's elements at even places and b's at odd ones.

    And `at` one place there, or neighbours.
    """
    last = at.coordinates[-1] if at.coordinates else None
    if not isinstance(last, Uniform) and not (isinstance(last, Affine) and last.stride == 1 and at.width > 1):
        return False
    source = op.operands[0]
    if source.op is None or source.is_argument or source.op.kind != "tt.join":
        return False
    shape = op.result.shape
    return len(source.shape) >= 2 and shape == (*source.shape[:-2], 2 * source.shape[-2])


def interleaved_index(b: Builder, at: Index) -> Index:
    """Where in a and b the lanes of reshape(join(a, b)) lie: at half the place, half as many."""
    last = at.coordinates[-1]
    if isinstance(last, Uniform):
        return at.moved((*at.coordinates[:-1], Uniform(b.div(last.x, 2))))
    assert isinstance(last, Affine) and last.stride == 1 and at.width > 1
    place = b.div(last.base, 2)
    half = at.width // 2
    return Index((*at.coordinates[:-1], Affine(place, 1) if half > 1 else Uniform(place)), half, at.masks)
