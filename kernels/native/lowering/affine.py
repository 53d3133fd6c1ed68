"""Arithmetic on what is known of lanes: integers that stay affine, masks that stay prefixes, numbers that are folded.

    %o = arith.addi %start, %range          Affine(start + i, 1)      not a vector
    %m = arith.cmpi slt, %o, %n             Prefix(n - start - i)     not a vector of booleans

Each function returns None for what is not so simple: `elementwise.py` then writes an instruction.
"""

import operator
from collections.abc import Callable

from ..ttir import Op
from .builder import Builder
from .elements import BITS, Operand, is_pointer, wrapped
from .lanes import Affine, Lane, Prefix, Uniform, Use, as_affine, narrow

KEEP_AFFINE = {"arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.trunci"}
_LARGE = 1 << 16  # what is multiplied by more than this and compared is a hash, no index: it wraps around within a tile


def affine(b: Builder, op: Op, operands: list[Lane], use: Use) -> Lane | None:
    """Sums, products by a number and changes of width of integers that are affine in the lane."""
    if not any(isinstance(operand, Affine) for operand in operands) or is_pointer(op.operands[0].element):
        return None
    source, target = op.operands[0].element, op.result.element
    if op.kind == "arith.extsi" and source == "i32" and isinstance(operands[0], Affine):
        return _widened(b, operands[0], use)
    if (op.kind, target) == ("arith.trunci", "i32") or (op.kind == "tt.bitcast" and source == target):
        return operands[0]
    if op.kind not in ("arith.addi", "arith.subi", "arith.muli"):
        return None
    sides = [as_affine(b, lane, value.element) for lane, value in zip(operands, op.operands, strict=True)]
    left, right = sides
    if left is None or right is None:
        return None
    if op.kind == "arith.muli":
        return _multiply(b, left, right, use)
    combine = b.add if op.kind == "arith.addi" else b.sub
    return _tidy(Affine(combine(left.base, right.base), combine(left.stride, right.stride)), op, b)


def _tidy(lane: Affine, op: Op, b: Builder) -> Lane:
    """With a stride of zero the value is uniform again."""
    return lane if lane.stride != 0 else Uniform(narrow(b, lane.base, op.result.element))


def _multiply(b: Builder, left: Affine, right: Affine, use: Use) -> Lane | None:
    if left.stride == 0:
        left, right = right, left
    if right.stride != 0 or (use is Use.BOUND and isinstance(right.base, int) and abs(right.base) >= _LARGE):
        return None
    return Affine(b.mul(left.base, right.base), b.mul(left.stride, right.base))


def _widened(b: Builder, lane: Affine, use: Use) -> Lane | None:
    """A lane value of 32 bits as one of 64."""
    if use is Use.ADDRESS:
        return lane
    if use is Use.VALUE or not isinstance(lane.stride, int):
        return None
    return Affine(_wrapped(b, lane.base), lane.stride)


def _wrapped(b: Builder, x: Operand) -> Operand:
    """What a number of 64 bits is in 32."""
    low = narrow(b, x, "i32")
    return b.let(f"sext i32 {low} to i64") if isinstance(low, str) else low


def prefix(b: Builder, op: Op, operands: list[Lane]) -> Prefix | None:
    """A comparison whose true lanes are the first ones; None for any other.

    base + stride * l < bound is a number of lanes, as long as the lanes of 32 bits do not run over the greatest integer.
    """
    predicate = op.attributes["words"][0]
    if not any(isinstance(operand, Affine) for operand in operands) or is_pointer(op.operands[0].element):
        return None
    left, right = (as_affine(b, lane, value.element) for lane, value in zip(operands, op.operands, strict=True))
    if predicate in ("sgt", "sge"):
        left, right = right, left
        predicate = {"sgt": "slt", "sge": "sle"}[predicate]
    if left is None or right is None or predicate not in ("slt", "sle"):
        return None
    if not (isinstance(left.stride, int) and isinstance(right.stride, int)) or left.stride <= right.stride:
        return None
    stride = left.stride - right.stride
    room = _room(b, left.base, right.base, int(predicate == "sle"), op.operands[0].element)
    return Prefix(room if stride == 1 else b.div(b.add(b.max(room, 0), stride - 1), stride))


def _room(b: Builder, low: Operand, high: Operand, more: int, element: str) -> Operand:
    """high - low + more; of 64 bits the nearest number that there is."""
    if element == "i32":
        return b.add(b.sub(_wrapped(b, high), _wrapped(b, low)), more)
    if isinstance(low, int) and isinstance(high, int):
        return min(max(high - low + more, -(1 << 63)), (1 << 63) - 1)
    room = b.call("i64", "llvm.ssub.sat.i64", ("i64", high), ("i64", low))
    return b.call("i64", "llvm.sadd.sat.i64", ("i64", room), ("i64", more)) if more else room


def conjunction(b: Builder, op: Op, operands: list[Lane]) -> Lane | None:
    """`and` of prefixes is a prefix; of a prefix and a boolean too."""
    if op.kind != "arith.andi" or not any(isinstance(operand, Prefix) for operand in operands):
        return None
    left, right = operands
    if isinstance(right, Prefix):
        left, right = right, left
    assert isinstance(left, Prefix)
    if isinstance(right, Prefix):
        return Prefix(b.min(left.count, right.count))
    if isinstance(right, Uniform):
        if isinstance(right.x, str):
            return Prefix(b.let(f"select i1 {right.x}, i64 {left.count}, i64 0"))
        return left if right.x else right
    return None


_FOLDS: dict[str, Callable[..., Operand]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.extsi": lambda x: x,
    "arith.minsi": min,
    "arith.maxsi": max,
}


def fold(op: Op, numbers: list[Operand]) -> Operand | None:
    """Arithmetic on numbers that are known at compile time."""
    if op.kind not in _FOLDS or any(isinstance(x, str) for x in numbers):
        return None
    value, element = _FOLDS[op.kind](*numbers), op.result.element
    if op.operands[0].element == "i1":  # true is -1, as an integer with a sign
        return bool(value) if op.kind in ("arith.andi", "arith.ori") else None
    return wrapped(int(value), BITS[element])
