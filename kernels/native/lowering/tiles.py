"""Tensors as formulas: a tile is not computed where TTIR computes it but where a loop needs some of its elements.

`Tiles.lanes(value, at)` gives the lane value of a tensor's elements at an index, by asking its op's operands for theirs:

    %y = arith.mulf %x, %w          at (i, j..j+15)   ->   lanes(x, at) * lanes(w, at)
    %w = tt.broadcast %v            [1, N] -> [M, N]  ->   lanes(v, (0, j..j+15))
    %x = tt.load %p, %mask, %zero                     ->   a load from lanes(p, at), if lanes(mask, at)

So a chain of elementwise ops needs no memory, and views (splat, broadcast, expand_dims, trans, reshape, split) none either:
they only change the index. What must be kept (`analysis.py` says which values) is in `stored`: scalars as operands, tiles in
buffers, and tensors that a loop only moves along as their first value and an offset.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..ttir import Op, Value
from . import memory
from .affine import KEEP_AFFINE, prefix
from .builder import Builder
from .elements import Operand, in_memory, is_pointer, splat_literal, vector_type
from .elementwise import constant, elementwise
from .index import Coordinates, Index, Masks
from .lanes import Affine, Lane, Prefix, Uniform, Use, Vector, as_vector, offset_pointer, widen
from .views import SOURCE_COORDINATES, VIEWS, interleaved_index, is_interleaving, joined


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tile in memory, row by row."""

    pointer: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """`initial + offset`: integers or pointers that a loop moves by the same amount in every element."""

    initial: Value
    offset: str


Storage = Uniform | Buffer | Advanced
Narrow = Callable[[Op, Lane, memory.Mask, int], memory.Mask]
"""Of an access through a pointer, with its mask: the lanes that may be accessed."""


class Tiles:
    """Where values are kept, and the formulas of all others."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.stored: dict[Value, Storage] = {}
        self.narrow: Narrow = lambda op, pointer, mask, width: mask

    def scalar(self, value: Value) -> Operand:
        lane = self.lanes(value, Index((), 1))
        return lane.x if isinstance(lane, Uniform) else as_vector(self.b, lane, value.element, 1)

    def lanes(self, value: Value, at: Index) -> Lane:
        stored = self.stored.get(value)
        if isinstance(stored, Uniform):
            return stored
        if at.use is not Use.VALUE and not _passes_on_its_use(value, stored):
            at = at.used(Use.VALUE)
        return self.b.remember((value, at), lambda: self._compute(value, at, stored))

    def vector(self, value: Value, at: Index) -> str:
        return as_vector(self.b, self.lanes(value, at), value.element, at.width)

    def _compute(self, value: Value, at: Index, stored: Storage | None) -> Lane:
        if isinstance(stored, Buffer):
            return self.load_buffer(value, stored, at)
        if isinstance(stored, Advanced):
            return self._advanced(value, stored, at)
        op = value.op
        assert op is not None, value.name
        if op.kind in FORMULAS:
            return FORMULAS[op.kind](self, op, value, at)
        return elementwise(self.b, op, [self.lanes(operand, at) for operand in op.operands], at.width, at.use)

    def _advanced(self, value: Value, stored: Advanced, at: Index) -> Lane:
        initial = self.lanes(stored.initial, at)
        if is_pointer(value.element):
            return offset_pointer(self.b, initial, Uniform(stored.offset), value.element, at.width)
        wide = widen(self.b, initial, value.element, at.width)
        if isinstance(wide, Affine):
            return Affine(self.b.add(wide.base, stored.offset), wide.stride)
        element, width = value.element, at.width if isinstance(wide, Vector) else 1
        by = stored.offset if element == "i64" else self.b.let(f"trunc i64 {stored.offset} to {element}")
        kind = vector_type(element, width)
        start = as_vector(self.b, initial, element, width)
        moved = self.b.let(f"add {kind} {start}, {self.b.splat(by, element, width)}")
        return Vector(moved) if isinstance(wide, Vector) else Uniform(moved)

    # -- buffers

    def buffer_pointer(self, shape: tuple[int, ...], element: str, buffer: str, at: Index) -> Lane:
        linear = self.linear(shape, at.coordinates, at.width)
        return offset_pointer(self.b, Uniform(buffer), linear, f"ptr:{in_memory(element)}", at.width)

    def load_buffer(self, value: Value, buffer: Buffer, at: Index) -> Lane:
        pointer = self.buffer_pointer(value.shape, value.element, buffer.pointer, at)
        return memory.load(self.b, pointer, value.element, None, None, at.width)

    def linear(self, shape: tuple[int, ...], coordinates: Coordinates, width: int) -> Lane:
        """The number of an element, row by row."""
        base: Operand = 0
        stride: Operand = 0
        gathered: list[str] = []
        kind = vector_type("i64", width)
        step = 1
        for size, coordinate in reversed(list(zip(shape, coordinates, strict=True))):
            if size > 1:
                if isinstance(coordinate, Uniform):
                    base = self.b.add(base, self.b.mul(coordinate.x, step))
                elif isinstance(coordinate, Affine):
                    base = self.b.add(base, self.b.mul(coordinate.base, step))
                    stride = self.b.add(stride, self.b.mul(coordinate.stride, step))
                else:
                    assert isinstance(coordinate, Vector)
                    gathered.append(self.b.let(f"mul {kind} {coordinate.x}, {splat_literal(step, 'i64', width)}"))
            step *= size
        regular = Uniform(base) if stride == 0 else Affine(base, stride)
        if not gathered:
            return regular
        total = as_vector(self.b, regular, "i64", width)
        for x in gathered:
            total = self.b.let(f"add {kind} {total}, {x}")
        return Vector(total)

    # -- masks

    def mask(self, value: Value, at: Index) -> memory.Mask:
        """The lanes inside, None for all of them. Where the loop's bounds hold, prefixes need no test."""
        if at.masks is Masks.TRUE:
            return None
        lane = self.lanes(value, at)
        if isinstance(lane, Prefix) and at.masks is not Masks.TEST:
            return None if at.masks is Masks.INSIDE else Uniform(False)
        if isinstance(lane, Uniform) and not isinstance(lane.x, str):
            return None if lane.x else Uniform(False)
        assert not isinstance(lane, Affine)
        return lane

    def prefix_bounds(self, value: Value, at: Index) -> list[Operand]:
        """The counts of all prefix masks below `value`, in lanes of `at`: below the least of them no mask is to be tested.

        `at` starts at lane coordinate 0. Only masks are computed, which are integers: no load is executed for it. Behind a
        reshape lanes run through rows, each with bounds of its own: masks there are always tested.
        """
        bounds: list[Operand] = []
        for op, where, lanes in self.reads(value, at, through_reshapes=False):
            mask = op.operands[1 if op.kind == "tt.load" else 0] if len(op.operands) > 1 else None
            lane = None if mask is None or mask.shape == () else self.lanes(mask, where)
            if isinstance(lane, Prefix):
                bounds.append(self.b.mul(self.b.min(lane.count, 1 << 31), lanes))
        return bounds

    def bound(self, mask: Value, dimension: int) -> Operand | None:
        """Indices of a dimension from which on the mask is false wherever else it is asked; None if it has no such bound."""
        counts = [
            part.count for varying, part in self.conjuncts(mask) if varying == {dimension} and isinstance(part, Prefix)
        ]
        if not counts:
            return None
        least = counts[0]
        for count in counts[1:]:
            least = self.b.min(least, count)
        return least

    def is_its_bounds(self, mask: Value, dimensions: list[int]) -> bool:
        """Whether a mask is nothing but its bounds: true wherever the indices of these dimensions lie below them."""
        return all(
            len(varying) == 1 and varying <= set(dimensions) and isinstance(part, Prefix)
            for varying, part in self.conjuncts(mask)
        )

    def conjuncts(self, mask: Value) -> list[tuple[set[int], Lane]]:
        """What a mask is the `and` of: the dimensions that each part varies in, and its lanes along the first of them."""
        found: list[tuple[set[int], Lane]] = []

        def visit(value: Value, dimensions: tuple[int, ...]) -> None:
            op = value.op
            if value not in self.stored and op is not None and not value.is_argument:
                if op.kind == "arith.andi":
                    for operand in op.operands:
                        visit(operand, dimensions)
                    return
                if op.kind == "tt.broadcast":
                    return visit(op.operands[0], dimensions)
                if op.kind == "tt.expand_dims":
                    axis = op.attributes["axis"]
                    return visit(op.operands[0], dimensions[:axis] + dimensions[axis + 1 :])
            varying = [place for place, size in enumerate(value.shape) if size > 1]
            coordinates: list[Lane] = [Uniform(0)] * len(value.shape)
            if varying:
                coordinates[varying[0]] = Affine(0, 1)
            lane = self.lanes(value, Index(tuple(coordinates), 1))
            found.append(({dimensions[place] for place in varying}, lane))
            return None

        visit(mask, tuple(range(len(mask.shape))))
        return found

    def reads(
        self, value: Value, at: Index, seen: set[tuple[Value, Index]] | None = None, *, through_reshapes: bool = True
    ) -> Iterator[tuple[Op, Index, int]]:
        """The loads and selects that `value` is made of: each with its index, and the lanes of `at` that one of its own is."""
        seen = set() if seen is None else seen
        op = value.op
        if (value, at) in seen or value in self.stored or op is None or value.shape == ():
            return
        seen.add((value, at))
        if op.kind in ("tt.load", "arith.select"):
            yield op, at, 1
        lanes = 1
        if op.kind == "tt.reshape" and is_interleaving(op, at):
            half = interleaved_index(self.b, at)
            lanes = at.width // half.width
            operands = [(operand, half) for operand in joined(op).operands]
        elif op.kind == "tt.reshape" and not through_reshapes and op.operands[0].shape != op.result.shape:
            return
        elif op.kind in VIEWS:
            operands = [(operand, at.moved(source)) for operand, source in self.sources(op, value, at)]
        else:
            operands = [(operand, at) for operand in op.operands]
        for operand, where in operands:
            for read, place, inner in self.reads(operand, where, seen, through_reshapes=through_reshapes):
                yield read, place, lanes * inner

    # -- views

    def sources(self, op: Op, value: Value, at: Index) -> list[tuple[Value, Coordinates]]:
        """The operands of a view, with the coordinates there of what is at `at` in its result."""
        if op.kind == "tt.join":
            return [(operand, at.coordinates[:-1]) for operand in op.operands]
        return [(op.operands[0], SOURCE_COORDINATES[op.kind](self, op, value, at))]


def _passes_on_its_use(value: Value, stored: Storage | None) -> bool:
    """Whether what a value is for is what its operands are for."""
    if is_pointer(value.element) or isinstance(stored, Buffer):
        return False
    return isinstance(stored, Advanced) or (value.op is not None and value.op.kind in KEEP_AFFINE | VIEWS)


# -- formulas of what is not arithmetic


def _view(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    (operand, source), *_ = tiles.sources(op, value, at)
    if op.kind == "tt.reshape" and operand.shape != value.shape:
        at = replace(at, masks=Masks.TEST)
    return tiles.lanes(operand, at.moved(source))


def _reshape_formula(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    if op.operands[0] in tiles.stored or not is_interleaving(op, at):
        return _view(tiles, op, value, at)
    b, element = tiles.b, value.element
    half = interleaved_index(b, at)
    left, right = (as_vector(b, tiles.lanes(operand, half), element, half.width) for operand in joined(op).operands)
    last = at.coordinates[-1]
    if isinstance(last, Uniform):
        return _choose(b, last.x, left, right, element, half.width)
    kind = vector_type(element, half.width)
    if half.width == 1:
        pair = vector_type(element, 2)
        first = b.let(f"insertelement {pair} poison, {kind} {left}, i64 0")
        return Vector(b.let(f"insertelement {pair} {first}, {kind} {right}, i64 1"))
    return Vector(b.shuffle(left, right, kind, [lane // 2 + lane % 2 * half.width for lane in range(at.width)]))


def _choose(b: Builder, which: Operand, left: str, right: str, element: str, width: int) -> Lane:
    """`left` where `which` is even."""
    if isinstance(which, int):
        return Vector(right if which % 2 else left)
    kind = vector_type(element, width)
    return Vector(b.let(f"select i1 {b.let(f'trunc i64 {which} to i1')}, {kind} {right}, {kind} {left}"))


def _join(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    b, last = tiles.b, at.coordinates[-1]
    source = at.moved(at.coordinates[:-1])
    if isinstance(last, Uniform):
        if isinstance(last.x, int):
            return tiles.lanes(op.operands[last.x], source)
        left, right = (tiles.vector(operand, source) for operand in op.operands)
        return _choose(b, last.x, left, right, value.element, at.width)
    number = as_vector(b, last, "i64", at.width)
    odd = b.let(f"trunc {vector_type('i64', at.width)} {number} to {vector_type('i1', at.width)}")
    return Vector(_select_lanes(tiles, odd, op.operands[1], op.operands[0], source))


def _select_lanes(tiles: Tiles, condition: str, then: Value, otherwise: Value, at: Index) -> str:
    kind = vector_type(then.element, at.width)
    x, y = tiles.vector(then, at), tiles.vector(otherwise, at)
    return tiles.b.let(f"select {vector_type('i1', at.width)} {condition}, {kind} {x}, {kind} {y}")


def _make_range(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    (place,), start = at.coordinates, op.attributes["start"]
    if isinstance(place, Affine):
        return Affine(tiles.b.add(place.base, start), place.stride)
    if isinstance(place, Vector):
        kind = vector_type("i32", at.width)
        narrow = tiles.b.let(f"trunc {vector_type('i64', at.width)} {place.x} to {kind}")
        return Vector(tiles.b.let(f"add {kind} {narrow}, {as_vector(tiles.b, Uniform(start), 'i32', at.width)}"))
    assert isinstance(place, Uniform)
    x = tiles.b.add(place.x, start)
    return Uniform(x if isinstance(x, int) else tiles.b.let(f"trunc i64 {x} to i32"))


def _addptr(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    pointer, offset = op.operands
    by = widen(tiles.b, tiles.lanes(offset, at.used(Use.ADDRESS)), offset.element, at.width)
    return offset_pointer(tiles.b, tiles.lanes(pointer, at), by, value.element, at.width)


def _compare(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    bounds = [tiles.lanes(operand, at.used(Use.BOUND)) for operand in op.operands]
    return prefix(tiles.b, op, bounds) or elementwise(
        tiles.b, op, [tiles.lanes(operand, at) for operand in op.operands], at.width
    )


def _load(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    mask = tiles.mask(op.operands[1], at) if len(op.operands) > 1 else None
    other = tiles.lanes(op.operands[2], at) if len(op.operands) > 2 else None
    if mask == Uniform(False):
        return other or Uniform(0)
    pointer = tiles.lanes(op.operands[0], at)
    mask = tiles.narrow(op, pointer, mask, at.width)
    return memory.load(tiles.b, pointer, value.element, mask, other, at.width)


def _select(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    condition, then, otherwise = op.operands
    mask = tiles.mask(condition, at)
    if mask is None:
        return tiles.lanes(then, at)
    if mask == Uniform(False):
        return tiles.lanes(otherwise, at)
    return elementwise(tiles.b, op, [mask, tiles.lanes(then, at), tiles.lanes(otherwise, at)], at.width)


def _gather(tiles: Tiles, op: Op, value: Value, at: Index) -> Lane:
    source, indices = op.operands
    place = widen(tiles.b, tiles.lanes(indices, at.used(Use.ADDRESS)), indices.element, at.width)
    axis = op.attributes["axis"]
    return tiles.lanes(source, at.moved((*at.coordinates[:axis], place, *at.coordinates[axis + 1 :])))


FORMULAS: dict[str, Callable[[Tiles, Op, Value, Index], Lane]] = {
    "arith.cmpi": _compare,
    "arith.constant": lambda tiles, op, value, at: Uniform(constant(op)),
    "arith.select": _select,
    "tt.addptr": _addptr,
    "tt.broadcast": _view,
    "tt.expand_dims": _view,
    "tt.gather": _gather,
    "tt.join": _join,
    "tt.load": _load,
    "tt.make_range": _make_range,
    "tt.reshape": _reshape_formula,
    "tt.splat": _view,
    "tt.split": _view,
    "tt.trans": _view,
}
