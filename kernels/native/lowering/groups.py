"""Loops over tiles: stores, reductions and kept tiles of one shape share a loop.

The innermost loop runs along the dimension whose neighbours lie beside one another in memory, a vector at a time; masks
that are prefixes (`lane < n`) become its bounds:

    tt.store %p, %y, %mask          lanes [0, n / 16 * 16)       full vectors, no mask, four a turn
                                    lanes up to n                one masked vector
                                    lanes beyond n               nothing for a store; a reduction adds what all of them are

    "tt.reduce"(%x) add, along the lanes: four accumulators, added up at the end, then across lanes
                    across the lanes: a vector of accumulators walks along the axis

Small tiles are unrolled, so that LLVM keeps them in registers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ttir import Op, Value
from . import memory
from .elements import Operand
from .index import Index, Masks
from .lanes import Affine, Lane, Prefix, Uniform
from .reductions import REPEATED, Accumulators, add_uniform, combining, emit_across, identity
from .tiles import Buffer

if TYPE_CHECKING:
    from .kernel import Kernel

UNROLLED_VECTORS = 32  # tiles of at most so many vectors are unrolled: LLVM then keeps them in registers
ACCUMULATORS = 4  # hides the 4 cycles of an addition


@dataclass(frozen=True, slots=True)
class Write:
    """A tile that is computed into a buffer of its shape."""

    value: Value
    buffer: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def values(self) -> list[Value]:
        return [self.value]


@dataclass(frozen=True, slots=True)
class _OfOp:
    """A root that is an op: its loop runs over its first operand's shape."""

    op: Op

    @property
    def shape(self) -> tuple[int, ...]:
        return self.op.operands[0].shape

    @property
    def values(self) -> list[Value]:
        return self.op.operands


class Store(_OfOp):
    @property
    def mask(self) -> Value | None:
        return self.op.operands[2] if len(self.op.operands) > 2 else None


class Reduction(_OfOp):
    @property
    def axis(self) -> int:
        return int(self.op.attributes["axis"])


Root = Write | Store | Reduction


def operation(root: Root) -> Op:
    """The store or reduction, or what makes the kept tile."""
    op = root.value.op if isinstance(root, Write) else root.op
    assert op is not None
    return op


def may_share_loop(roots: list[Root], root: Root) -> bool:
    """Reductions share a loop with others of their shape only along the last dimension."""
    if roots[0].shape != root.shape:
        return False
    axes = {each.axis for each in (*roots, root) if isinstance(each, Reduction)}
    return not axes or (len(axes) == 1 and all(size == 1 for size in root.shape[max(axes) + 1 :]))


def emit_group(k: "Kernel", roots: list[Root], loaded: Sequence[Value] = ()) -> None:
    """Writes the loops of `roots`, which have one shape and do not depend on one another.

    `loaded` are tiles of this shape of which each vector is read before a root writes, since a store may overwrite it.
    """
    lane_dimension = _lane_dimension(k, roots)
    axes = [root.axis for root in roots if isinstance(root, Reduction)]
    if axes and axes[0] != lane_dimension:
        if len(roots) > 1:
            lane_dimension = axes[0]
        else:
            reduction = roots[0]
            assert isinstance(reduction, Reduction)
            return emit_across(k, reduction.op, lane_dimension)
    with k.b.scope():
        _Loop(k, roots, lane_dimension, loaded).emit()
    return None


def _lane_dimension(k: "Kernel", roots: list[Root]) -> int:
    """The dimension along which most of what is read and written is contiguous; stores count most."""
    shape = roots[0].shape
    long = [dimension for dimension, size in enumerate(shape) if size > 1]
    if len(long) < 2:
        return long[0] if long else len(shape) - 1
    scores = {dimension: sum(_contiguous(k, root, dimension) for root in roots) for dimension in long}
    return max(long, key=lambda dimension: (scores[dimension], dimension))


def _contiguous(k: "Kernel", root: Root, dimension: int) -> int:
    at = _first(root.shape, dimension, min(k.b.lanes, root.shape[dimension]))
    with k.b.trial():
        if isinstance(root, Store):
            pointers = [(root.op.operands[0], at, 16)]
            values = root.values[1:]
        else:
            pointers, values = [], root.values
        for value in values:
            pointers += [
                (op.operands[0], where, 1) for op, where, _ in k.tiles.reads(value, at) if op.kind == "tt.load"
            ]
        strides = [(k.tiles.lanes(pointer, where), weight) for pointer, where, weight in pointers]
    score = sum(weight for lane, weight in strides if isinstance(lane, Affine) and lane.stride == 1)
    return score + (isinstance(root, Write) and dimension == len(root.shape) - 1)


def _first(shape: tuple[int, ...], dimension: int, width: int) -> Index:
    """The first lanes along a dimension, at the start of all others."""
    coordinates: list[Lane] = [Uniform(0)] * len(shape)
    if shape[dimension] > 1:
        coordinates[dimension] = Affine(0, 1)
    return Index(tuple(coordinates), width)


class _Loop:
    """The loops of one group."""

    def __init__(self, k: "Kernel", roots: list[Root], lane_dimension: int, loaded: Sequence[Value]) -> None:
        self.k, self.b, self.tiles, self.roots, self.loaded = k, k.b, k.tiles, roots, loaded
        self.shape, self.lane_dimension = roots[0].shape, lane_dimension
        self.extent = self.shape[lane_dimension]
        self.width = min(k.b.lanes, self.extent)
        self.unrolled = math.prod(self.shape) // self.width <= UNROLLED_VECTORS
        self.reductions = [root for root in roots if isinstance(root, Reduction)]
        known = all(identity(root.op) is not None for root in self.reductions)
        self.turn = min(ACCUMULATORS, self.extent // self.width) if known and not self.unrolled else 1
        self.buffers = {
            root: [k.buffer(result) for result in root.op.results] for root in self.reductions if root.op.result.shape
        }

    def emit(self) -> None:
        outer = [dimension for dimension in range(len(self.shape)) if dimension != self.lane_dimension]
        bounds = self.row_bounds(outer)
        self.nest(outer, {}, bounds)
        for root, buffers in self.buffers.items():
            for result, buffer in zip(root.op.results, buffers, strict=True):
                self.tiles.stored[result] = Buffer(buffer)

    def row_bounds(self, outer: list[int]) -> dict[int, Operand]:
        """How far the outer dimensions go: where only stores happen, up to the largest of their prefix masks."""
        masks = [root.mask for root in self.roots if isinstance(root, Store)]
        if len(masks) < len(self.roots) or any(mask is None for mask in masks):
            return {}
        bounds: dict[int, Operand] = {}
        for dimension in outer:
            counts = [
                count for mask in masks if mask is not None and (count := self.tiles.bound(mask, dimension)) is not None
            ]
            if self.shape[dimension] > 1 and len(counts) == len(masks):
                largest = counts[0]
                for count in counts[1:]:
                    largest = self.b.max(largest, count)
                bounds[dimension] = self.b.clamp(largest, 0, self.shape[dimension])
        return bounds

    def nest(self, outer: list[int], fixed: dict[int, Operand], bounds: dict[int, Operand]) -> None:
        if not outer:
            with self.b.scope():
                return self.emit_lanes(fixed)
        dimension, *rest = outer
        size = self.shape[dimension]
        high = bounds.get(dimension, size)
        return self.b.loop(0, high, 1, lambda i: self.nest(rest, {**fixed, dimension: i}, bounds), unroll=self.unrolled)

    def index(self, fixed: dict[int, Operand], i: Operand, masks: Masks) -> Index:
        coordinates: list[Lane] = [Uniform(fixed.get(dimension, 0)) for dimension in range(len(self.shape))]
        coordinates[self.lane_dimension] = Affine(i, 1) if self.width > 1 else Uniform(i)
        return Index(tuple(coordinates), self.width, masks)

    def emit_lanes(self, fixed: dict[int, Operand]) -> None:
        """All lanes at one place of the outer dimensions."""
        b, width, extent = self.b, self.width, self.extent
        accumulators = {root: Accumulators(self.k, root.op, self.turn, width) for root in self.reductions}
        bounds = self.lane_bounds(fixed)

        def body(i: Operand, masks: Masks, turn: int) -> None:
            with b.scope():
                self.emit_vector(self.index(fixed, i, masks), accumulators, turn)

        def turns(i: Operand) -> None:
            for turn in range(self.turn):
                body(b.add(i, turn * width), Masks.INSIDE, turn)

        start = 0
        if any(not accumulator.has_identity for accumulator in accumulators.values()):
            body(0, Masks.TEST, 0)
            start = width
        if not bounds:
            b.loop(start, extent, width * self.turn, turns, unroll=self.unrolled)
            remaining: Operand = 0
            outside = None
        else:
            low, high = bounds[0], bounds[0]
            for bound in bounds[1:]:
                low, high = b.min(low, bound), b.max(high, bound)
            full = b.max(b.round_down(b.clamp(low, 0, extent), width), start)
            unrolled_end = b.max(b.round_down(full, width * self.turn), start)
            b.loop(start, unrolled_end, width * self.turn, turns)
            if self.turn > 1:
                b.loop(unrolled_end, full, width, lambda i: body(i, Masks.INSIDE, 0))
            outside = self.outside(fixed, accumulators)
            end = (
                extent
                if outside is None
                else b.max(b.round_down(b.add(b.clamp(high, 0, extent), width - 1), width), start)
            )
            b.loop(full, end, width, lambda i: body(i, Masks.TEST, 0))
            remaining = b.sub(extent, end)
        for reduction, accumulator in accumulators.items():
            results = accumulator.total()
            if outside is not None:
                results = [add_uniform(self.k, reduction.op, results[0], outside[reduction], remaining)]
            self.keep_results(reduction, results, fixed)
        if outside is not None:
            for root in self.roots:
                if isinstance(root, Write):
                    self.fill(root, outside[root], fixed, b.sub(extent, remaining))

    def lane_bounds(self, fixed: dict[int, Operand]) -> list[Operand]:
        at = self.index(fixed, 0, Masks.TEST)
        bounds: list[Operand] = []
        if self.width == 1:
            return bounds
        for root in self.roots:
            for value in root.values:
                bounds += self.tiles.prefix_bounds(value, at)
            if isinstance(root, Store) and root.mask is not None:
                lane = self.tiles.lanes(root.mask, at)
                bounds += [lane.count] if isinstance(lane, Prefix) else []
        return list(dict.fromkeys(bounds))

    def outside(
        self, fixed: dict[int, Operand], accumulators: dict[Reduction, Accumulators]
    ) -> dict[Root, Operand] | None:
        """What each root's lanes hold beyond all prefix masks, if that is the same in all of them; None if it is not."""
        found: dict[Root, Operand] = {}
        at = self.index(fixed, 0, Masks.OUTSIDE)
        for root in self.roots:
            if isinstance(root, Store):
                if root.mask is None or self.tiles.mask(root.mask, at) != Uniform(False):
                    return None
                continue
            if isinstance(root, Reduction) and (len(root.values) > 1 or combining(root.op) not in REPEATED):
                return None
            lane = self.tiles.lanes(root.values[0], at)
            if not isinstance(lane, Uniform):
                return None
            found[root] = lane.x
        return found

    def emit_vector(self, at: Index, accumulators: dict[Reduction, Accumulators], turn: int) -> None:
        for tile in self.loaded:
            self.tiles.lanes(tile, at)  # which the formulas of all roots find, whichever parts of them are computed
        for root in self.roots:
            if isinstance(root, Store):
                pointer, value, *_ = root.op.operands
                mask = None if root.mask is None else self.tiles.mask(root.mask, at)
                lanes = self.tiles.lanes(pointer, at)
                x = self.tiles.lanes(value, at)
                mask = self.tiles.narrow(root.op, lanes, mask, at.width)
                streams = self.k.analysis.streams(root.op)
                memory.store(self.b, lanes, x, value.element, mask, at.width, streams=streams)
            elif isinstance(root, Write):
                pointer_lane = self.tiles.buffer_pointer(self.shape, root.value.element, root.buffer, at)
                memory.store(self.b, pointer_lane, self.tiles.lanes(root.value, at), root.value.element, None, at.width)
            else:
                accumulators[root].add([self.tiles.vector(value, at) for value in root.values], turn)

    def keep_results(self, root: Reduction, results: list[str], fixed: dict[int, Operand]) -> None:
        if root not in self.buffers:
            for result, x in zip(root.op.results, results, strict=True):
                self.tiles.stored[result] = Uniform(x)
            return
        coordinates = tuple(Uniform(fixed[d]) for d in range(len(self.shape)) if d != root.axis)
        for result, x, buffer in zip(root.op.results, results, self.buffers[root], strict=True):
            pointer = self.tiles.buffer_pointer(result.shape, result.element, buffer, Index(coordinates, 1))
            memory.store(self.b, pointer, Uniform(x), result.element, None, 1)

    def fill(self, root: Write, x: Operand, fixed: dict[int, Operand], start: Operand) -> None:
        """The lanes of a kept tile that lie beyond all masks."""
        element = root.value.element

        def body(i: Operand) -> None:
            pointer = self.tiles.buffer_pointer(self.shape, element, root.buffer, self.index(fixed, i, Masks.TEST))
            memory.store(self.b, pointer, Uniform(x), element, None, self.width)

        self.b.loop(start, self.extent, self.width, body)
