"""The one step of all products on vectors: z + x * y, rounded once."""

from ..builder import Builder
from ..elements import is_float, suffix, vector_type


def multiply_add(b: Builder, x: str, y: str, z: str, element: str, width: int) -> str:
    kind = vector_type(element, width)
    if is_float(element):
        return b.call(kind, f"llvm.fma.{suffix(element, width)}", (kind, x), (kind, y), (kind, z))
    return b.let(f"add {kind} {z}, {b.let(f'mul {kind} {x}, {y}')}")


def add_pairs(b: Builder, x: str, y: str, z: str, lanes: int) -> str:
    """To each float32 lane of `z` the products of two neighbours: of `x` and `y`, twice as many bfloat16 as their bits."""
    bits, pairs, kind = vector_type("bf16", 2 * lanes), f"<{2 * lanes} x bfloat>", vector_type("f32", lanes)
    x, y = (b.let(f"bitcast {bits} {operand} to {pairs}") for operand in (x, y))
    return b.call(kind, f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", (kind, z), (pairs, x), (pairs, y))
