"""Matrix products: `tl.dot` as register tiles.

    %c = tt.dot %a, %b, %acc : [M, K] x [K, N]

rows.py          vectors along K, where both operands are contiguous in it (x @ weight.T): nothing is packed, each element is
                 read where it lies. For few rows, whose time is that of reading the other operand.
columns.py       vectors along N, an element of a in every lane:  acc[i][j] = fma(a[i, k], b[k, j..j+15], acc[i][j])
packed.py        the same for larger tiles, b first packed so that vectors along N are contiguous: transposed where it lies along
                 K, and in pairs along K for bfloat16, which `vdpbf16ps` multiplies 32 at a time
matrix_unit.py   larger tiles of bfloat16 on a CPU with AMX: 16 x 16 x 32 products an instruction

Rows, columns and K beyond an operand's prefix masks hold zeros, and the first two forms do not compute them: 2 rows of a tile of 16
cost 2. The third does not compute rows and K. This is the only place where a multiplication and an addition are fused.
"""

from typing import TYPE_CHECKING

from ...ttir import Op, Value
from ..elements import is_float
from ..groups import Write, emit_group
from ..lanes import Uniform
from ..tiles import Buffer
from .columns import AlongN
from .matrix_unit import MatrixUnit, Streamed, fits_matrix_unit, streams_through_matrix_unit
from .operands import Product, is_contiguous, is_packed, is_zero, mask_is_its_bounds, prefix_bound
from .packed import Packed
from .rows import AlongK

if TYPE_CHECKING:
    from ..kernel import Kernel

__all__ = ["emit_dot"]


def emit_dot(k: "Kernel", op: Op) -> None:
    a, b, accumulator = op.operands
    result = op.result
    buffer = _accumulates_in_place(k, op) or k.buffer(result)
    with k.b.scope():
        if fits_matrix_unit(op, k.b.machine):
            if not is_zero(accumulator):
                _write_accumulator(k, accumulator, buffer)
            MatrixUnit(k, Product(a, b, result, buffer), from_zero=is_zero(accumulator)).emit()
        elif is_packed(op, k.b.machine):
            Packed(k, Product(a, b, result, buffer), accumulator).emit_all()
        else:
            _write_accumulator(k, accumulator, buffer)
            if len(result.shape) == 2:
                _emit_unpacked(k, Product(a, b, result, buffer))
            else:
                body = lambda i: _emit_unpacked(k, Product(a, b, result, buffer, (Uniform(i),)))  # noqa: E731
                k.b.loop(0, result.shape[0], 1, body)
    k.tiles.stored[result] = Buffer(buffer)


def _write_accumulator(k: "Kernel", accumulator: Value, buffer: str) -> None:
    if k.tiles.stored.get(accumulator) != Buffer(buffer):
        emit_group(k, [Write(accumulator, buffer)])


def _accumulates_in_place(k: "Kernel", op: Op) -> str | None:
    """The buffer of the carried value that this product's result becomes, if nothing else needs its old value."""
    from ..control import buffers_read

    if (
        not k.frames
        or k.frames[-1].op.kind != "scf.for"
        or len(op.result.uses) != 1
        or op.parent is not k.frames[-1].op
    ):
        return None
    frame = k.frames[-1]
    (body,) = frame.op.regions[0]
    yielded = body.ops[-1]
    if op.result.uses[0] is not yielded or not frame.slots:
        return None
    position = yielded.operands.index(op.result)
    slot, carried = frame.slots[position], body.arguments[position + 1]
    reads = buffers_read(k, op.operands[2])
    others = {other.pointer for other in frame.slots if other is not slot}
    if slot.initial is not None or reads.get(slot.pointer) or others & set(reads):
        return None
    if any(slot.pointer in buffers_read(k, operand) for operand in op.operands[:2]):
        return None  # the accumulator is written before the operands are read
    return slot.pointer if k.consumers(carried) <= {op} else None


def _emit_unpacked(k: "Kernel", product: Product) -> None:
    lead = len(product.lead)
    rows = prefix_bound(k, product.a, lead, product.m)
    columns = prefix_bound(k, product.b, lead + 1, product.n)
    inner = k.b.min(
        prefix_bound(k, product.a, lead + 1, product.k),
        prefix_bound(k, product.b, lead, product.k),
    )
    exact = mask_is_its_bounds(k, product.a), mask_is_its_bounds(k, product.b)
    along_k = is_contiguous(k, product.a, product.lead, 1) and is_contiguous(k, product.b, product.lead, 0)
    if along_k and streams_through_matrix_unit(k, product):
        whole_rows, whole_inner = k.b.round_down(rows, 16), k.b.round_down(inner, 32)
        Streamed(k, product, whole_inner).emit(whole_rows)
        AlongK(k, product, inner, exact, start=whole_inner).emit(whole_rows, columns)  # what is left of K
        AlongK(k, product, inner, exact).emit(rows, columns, first_row=whole_rows)
    elif along_k and is_float(product.a.element):
        AlongK(k, product, inner, exact).emit(rows, columns)
    else:
        AlongN(k, product, inner, (exact[0], exact[1] and columns == product.n)).emit(rows)
