"""Reductions: what they combine with, in vectors of accumulators along the lanes, or one element of the axis after the other.

along the lanes         `groups.py` gathers in `Accumulators`; `total` adds them up, and then across lanes
across the lanes        `emit_across`: a vector of results walks along the axis
"""

import math
from typing import TYPE_CHECKING

from ..ttir import Op, Value
from . import memory
from .elements import Operand, literal, llvm_type, splat_literal, vector_type
from .elementwise import constant, elementwise
from .index import Index
from .lanes import Affine, Lane, Uniform, Vector, as_vector
from .tiles import Buffer

if TYPE_CHECKING:
    from .kernel import Kernel

IDENTITIES: dict[str, Operand] = {
    "arith.addf": 0.0, "arith.addi": 0, "arith.maxnumf": math.nan, "arith.maximumf": -math.inf, "arith.minnumf": math.nan,
    "arith.minimumf": math.inf, "arith.ori": 0, "arith.xori": 0, "arith.mulf": 1.0, "arith.muli": 1,
}  # fmt: skip
REPEATED = {
    "arith.addf", "arith.addi", "arith.maxnumf", "arith.maximumf", "arith.minnumf", "arith.minimumf", "arith.ori",
}  # fmt: skip
"""Combining with n equal elements is one step: times n for sums, once for the others."""


def combining(op: Op) -> str:
    """The kind of the one op that a reduction combines with; "" if it has more."""
    (block,) = op.regions[0]
    return block.ops[0].kind if len(block.ops) == 2 and len(op.operands) == 1 else ""


def identity(op: Op) -> Operand | None:
    return IDENTITIES.get(combining(op))


def combine(k: "Kernel", op: Op, left: list[str], right: list[str], width: int) -> list[str]:
    """Applies the region of a reduction or scan to vectors."""
    (block,) = op.regions[0]
    lanes: dict[Value, Lane] = {value: Vector(x) for value, x in zip(block.arguments, [*left, *right], strict=True)}
    for inner in block.ops[:-1]:
        if inner.kind == "arith.constant":
            lanes[inner.result] = Uniform(constant(inner))
            continue
        operands = [lanes[v] if v in lanes else Uniform(k.tiles.scalar(v)) for v in inner.operands]
        lanes[inner.result] = elementwise(k.b, inner, operands, width)
    return [as_vector(k.b, lanes[value], value.element, width) for value in block.ops[-1].operands]


def across_lanes(k: "Kernel", op: Op, vectors: list[str], width: int) -> list[str]:
    """One element for each operand: halves are combined until one lane is left."""
    elements = [operand.element for operand in op.operands]
    while width > 1:
        half = width // 2
        halves: list[list[str]] = []
        for start in (0, half):
            halves.append([])
            for x, element in zip(vectors, elements, strict=True):
                kind = vector_type(element, width)
                if half == 1:
                    halves[-1].append(k.b.let(f"extractelement {kind} {x}, i64 {start}"))
                else:
                    halves[-1].append(k.b.shuffle(x, "poison", kind, list(range(start, start + half))))
        vectors = combine(k, op, halves[0], halves[1], half)
        width = half
    return vectors


def add_uniform(k: "Kernel", op: Op, total: str, x: Operand, count: Operand) -> str:
    """`total` combined with `count` more elements that all are `x`."""
    b, element, kind = k.b, op.operands[0].element, combining(op)
    text = literal(x, element)
    if count == 0 or x == identity(op):
        return total
    if kind in ("arith.addf", "arith.addi"):
        scalar = llvm_type(element)
        if kind == "arith.addf":
            times = b.let(f"sitofp i64 {count} to {scalar}")
            more = b.let(f"fmul {scalar} {text}, {times}")
        else:
            times = b.let(f"trunc i64 {count} to {scalar}") if element != "i64" else str(count)
            more = b.let(f"mul {scalar} {text}, {times}")
        return b.let(
            f"select i1 {b.let(f'icmp eq i64 {count}, 0')}, {scalar} {total}, {scalar} {combine(k, op, [total], [more], 1)[0]}"
        )
    combined = combine(k, op, [total], [text], 1)[0]
    return b.let(
        f"select i1 {b.let(f'icmp eq i64 {count}, 0')}, {llvm_type(element)} {total}, {llvm_type(element)} {combined}"
    )


class Accumulators:
    """Vectors in which a reduction along the lanes is gathered."""

    def __init__(self, k: "Kernel", op: Op, count: int, width: int) -> None:
        self.k, self.op, self.width = k, op, width
        self.elements = [operand.element for operand in op.operands]
        self.kinds = [vector_type(element, width) for element in self.elements]
        self.slots = [[k.b.alloca(kind, "sum") for kind in self.kinds] for _ in range(count)]
        start = identity(op)
        self.has_identity = start is not None
        self.started = self.has_identity
        if start is not None:
            for slots in self.slots:
                k.b.emit(f"store {self.kinds[0]} {splat_literal(start, self.elements[0], width)}, ptr {slots[0]}")

    def add(self, vectors: list[str], turn: int) -> None:
        b = self.k.b
        if self.started:
            before = [
                b.let(f"load {kind}, ptr {slot}") for kind, slot in zip(self.kinds, self.slots[turn], strict=True)
            ]
            vectors = combine(self.k, self.op, before, vectors, self.width)
        self.started = True
        for kind, slot, x in zip(self.kinds, self.slots[turn], vectors, strict=True):
            b.emit(f"store {kind} {x}, ptr {slot}")

    def total(self) -> list[str]:
        b = self.k.b
        parts = [
            [b.let(f"load {kind}, ptr {slot}") for kind, slot in zip(self.kinds, slots, strict=True)]
            for slots in self.slots
        ]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [combine(self.k, self.op, parts[i], parts[i + half], self.width) for i in range(half)]
        return across_lanes(self.k, self.op, parts[0], self.width)


def emit_across(k: "Kernel", op: Op, lane_dimension: int) -> None:
    """Along an axis that is not the lanes': a vector of results at a time, one element of the axis after the other."""
    b, shape, axis = k.b, op.operands[0].shape, int(op.attributes["axis"])
    width = min(b.lanes, shape[lane_dimension])
    elements = [operand.element for operand in op.operands]
    kinds = [vector_type(element, width) for element in elements]
    buffers = [k.buffer(result) for result in op.results]
    outer = [dimension for dimension in range(len(shape)) if dimension not in (axis, lane_dimension)]

    def lanes(fixed: dict[int, Operand], i: Operand) -> None:
        def at(j: Operand) -> Index:
            coordinates: list[Lane] = [Uniform(fixed.get(dimension, 0)) for dimension in range(len(shape))]
            coordinates[lane_dimension] = Affine(i, 1) if width > 1 else Uniform(i)
            coordinates[axis] = Uniform(j)
            return Index(tuple(coordinates), width)

        slots = [b.alloca(kind, "sum") for kind in kinds]

        def keep(vectors: list[str]) -> None:
            for kind, slot, x in zip(kinds, slots, vectors, strict=True):
                b.emit(f"store {kind} {x}, ptr {slot}")

        def body(j: Operand) -> None:
            before = [b.let(f"load {kind}, ptr {slot}") for kind, slot in zip(kinds, slots, strict=True)]
            keep(combine(k, op, before, [k.tiles.vector(value, at(j)) for value in op.operands], width))

        keep([k.tiles.vector(value, at(0)) for value in op.operands])
        b.loop(1, shape[axis], 1, body)
        coordinates = tuple(c for dimension, c in enumerate(at(0).coordinates) if dimension != axis)
        for result, buffer, kind, slot in zip(op.results, buffers, kinds, slots, strict=True):
            pointer = k.tiles.buffer_pointer(result.shape, result.element, buffer, Index(coordinates, width))
            memory.store(b, pointer, Vector(b.let(f"load {kind}, ptr {slot}")), result.element, None, width)

    def nest(dimensions: list[int], fixed: dict[int, Operand]) -> None:
        if not dimensions:
            with b.scope():
                return b.loop(0, shape[lane_dimension], width, lambda i: lanes(fixed, i))
        dimension, *rest = dimensions
        return b.loop(0, shape[dimension], 1, lambda i: nest(rest, {**fixed, dimension: i}))

    nest(outer, {})
    for result, buffer in zip(op.results, buffers, strict=True):
        k.tiles.stored[result] = Buffer(buffer)
