"""What is known of a product's operands: where they are loaded from, how far they go before there are only zeros."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...machine import Machine
from ...ttir import Op, Value
from ..elements import Operand
from ..elementwise import constant
from ..index import Index
from ..lanes import Affine, Lane, Uniform

if TYPE_CHECKING:
    from ..kernel import Kernel

LEAST_PACKED = 32  # rows and columns: packing K x N is then at most 1/32 of the additions


@dataclass(frozen=True, slots=True)
class Product:
    """A product and where its result lies."""

    a: Value
    b: Value
    result: Value
    buffer: str
    lead: tuple[Lane, ...] = ()  # of a batch of products

    @property
    def m(self) -> int:
        return self.a.shape[-2]

    @property
    def n(self) -> int:
        return self.b.shape[-1]

    @property
    def k(self) -> int:
        return self.a.shape[-1]


def is_bfloat16(op: Op) -> bool:
    return all(operand.element == "bf16" for operand in op.operands[:2])


def takes_pairs(op: Op, machine: Machine) -> bool:
    """Whether a larger product of bfloat16 is computed as such by vectors, two along K at a time."""
    return machine.has_bf16_products and not machine.prefers_float32 and is_bfloat16(op)


def is_packed(op: Op, machine: Machine) -> bool:
    """Whether a product is large enough for its right operand to be packed first."""
    a, b, _ = op.operands
    return (
        op.result.element == "f32"
        and len(a.shape) == 2
        and min(a.shape[0], b.shape[1]) >= LEAST_PACKED
        and a.shape[1] >= 2 * machine.lanes(4)
    )


def mask_is_its_bounds(k: "Kernel", value: Value) -> bool:
    """Whether an operand is simply loaded, and within the bounds of its rows and columns no mask is to be tested."""
    found = loaded(k, value)
    if found is None or len(found[0].operands) < 2:
        return found is not None
    load, dimensions = found
    _, mask, *other = load.operands
    with k.b.trial():
        return (not other or is_zero(other[0])) and k.tiles.is_its_bounds(mask, dimensions[-2:])


def loaded(k: "Kernel", value: Value) -> tuple[Op, list[int]] | None:
    """The load behind an operand, through transposes, with the dimension of it that each dimension of the operand is."""
    dimensions = list(range(len(value.shape)))
    while value not in k.tiles.stored and value.op is not None and not value.is_argument:
        if value.op.kind == "tt.load":
            return value.op, dimensions
        if value.op.kind != "tt.trans":
            return None
        order = value.op.attributes["order"]
        dimensions = [order[dimension] for dimension in dimensions]
        value = value.op.operands[0]
    return None


def prefix_bound(k: "Kernel", value: Value, dimension: int, size: int) -> Operand:
    """How many indices of a dimension an operand has before there are only zeros."""
    found = _zeros(value)
    if found is None:
        return size
    mask, dimensions = found
    bound = k.tiles.bound(mask, dimensions[dimension])
    return size if bound is None else k.b.clamp(bound, 0, size)


def _zeros(value: Value) -> tuple[Value, list[int]] | None:
    """The mask outside of which an operand is zero, with the dimension of it that each of the operand's is: that of a load, or of a
    select that writes zeros, which says it of a tile in a buffer, too. Decoding one row in bfloat16 took 22 GB/s of the weights behind
    a norm, where x is such a tile, and 27 elsewhere: each second product was with a row of zeros."""
    dimensions = list(range(len(value.shape)))
    while value.op is not None and not value.is_argument:
        op = value.op
        if op.kind == "tt.load":
            _, *rest = op.operands
            return (rest[0], dimensions) if rest and all(map(is_zero, rest[1:])) else None
        if op.kind == "arith.select":
            mask, _, other = op.operands
            return (mask, dimensions) if mask.shape and is_zero(other) else None
        if op.kind == "tt.trans":
            dimensions = [op.attributes["order"][dimension] for dimension in dimensions]
        elif op.kind not in ("arith.extf", "arith.truncf"):
            return None
        value = op.operands[0]
    return None


def is_zero(value: Value) -> bool:
    return (
        value.op is not None and not value.is_argument and value.op.kind == "arith.constant" and constant(value.op) == 0
    )


def is_contiguous(k: "Kernel", value: Value, lead: tuple[Lane, ...], dimension: int) -> bool:
    """Whether neighbours along a dimension lie beside one another in memory."""
    coordinates: list[Lane] = [Uniform(0)] * 2
    coordinates[dimension] = Affine(0, 1)
    at = Index((*(Uniform(0) for _ in lead), *coordinates), 1)
    found = loaded(k, value)
    with k.b.trial():
        if found is None:
            source, where = value, at
            while source not in k.tiles.stored and source.op is not None and source.op.kind == "tt.trans":
                (source, moved) = k.tiles.sources(source.op, source, where)[0]
                where = where.moved(moved)
            linear = k.tiles.linear(source.shape, where.coordinates, 1)
            return isinstance(linear, Affine) and linear.stride == 1
        load, dimensions = found
        places = [at.coordinates[dimensions.index(d)] for d in range(len(dimensions))]
        lane = k.tiles.lanes(load.operands[0], Index(tuple(places), 1))
    return isinstance(lane, Affine) and lane.stride == 1
