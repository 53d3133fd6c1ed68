"""Whether a tile's elements lie at different places: only then may a loop read and write it element by element.

p + 2 * r[:, None] * n + r[None, :]      {0: None, 1: 1}    a number that is not known is taken to be large enough
p + r[:, None] + r[None, :]              {0: 1, 1: 1}       the same place for (0, 1) and (1, 0)
p + r % 4                                None               not a sum of coordinates: nothing is known
"""

from collections.abc import Callable

from ..ttir import Op, Value
from .elementwise import constant

Strides = dict[int, int | None]
"""By how much an address grows along each dimension; None for a number known at run time. Others do not change it."""
Known = dict[Value, Strides | None]


def are_distinct(pointers: Value) -> bool:
    """Whether no two elements of a tile of pointers are the same, as far as constants tell."""
    strides = _strides(pointers, {})
    long = [dimension for dimension, size in enumerate(pointers.shape) if size > 1]
    if strides is None or any(strides.get(dimension, 0) == 0 for dimension in long):
        return False
    reach = 0  # from the first element to the last, along all dimensions so far
    for stride, dimension in sorted((abs(strides[d] or 0), d) for d in long if strides[d] is not None):
        if stride <= reach:
            return False
        reach += stride * (pointers.shape[dimension] - 1)
    return reach < 1 << 31  # or integers of 32 bits have wrapped around, to a place where an element is already


def _strides(value: Value, found: Known) -> Strides | None:
    """None for what is not a sum of coordinates times numbers."""
    if value not in found:
        found[value] = _of_op(value, found)
    return found[value]


def _of_op(value: Value, found: Known) -> Strides | None:
    op = value.op
    if value.shape == () or op is None:
        return {}
    if op.kind == "scf.for":
        return _carried(value, op, found)
    if value.is_argument or op.kind not in _RULES:
        return None
    operands = [_strides(operand, found) for operand in op.operands]
    known = [strides for strides in operands if strides is not None]
    return _RULES[op.kind](op, known) if len(known) == len(operands) else None


def _carried(value: Value, loop: Op, found: Known) -> Strides | None:
    """Of what a loop moves by the same in every element."""
    number = value.position - value.is_argument
    carried, yielded = loop.regions[0][0].arguments[1 + number], loop.regions[0][-1].ops[-1].operands[number]
    step = yielded.op
    if step is None or yielded.is_argument or step.kind not in ("arith.addi", "tt.addptr"):
        return None
    if carried not in step.operands or any(
        _strides(each, found) != {} for each in step.operands if each is not carried
    ):
        return None
    return _strides(loop.operands[3 + number], found)


def _sum(op: Op, operands: list[Strides]) -> Strides:
    left, right = operands
    sign = -1 if op.kind == "arith.subi" else 1
    return {d: _add(left.get(d, 0), right.get(d, 0), sign) for d in left | right}


def _add(x: int | None, y: int | None, sign: int) -> int | None:
    return None if x is None or y is None else x + sign * y


def _product(op: Op, operands: list[Strides]) -> Strides | None:
    left, right = operands
    if left and right:
        return None
    factor = _number(op.operands[0] if right else op.operands[1])
    return {d: None if x is None or factor is None else x * factor for d, x in (left or right).items()}


def _number(value: Value) -> int | None:
    """Of a tile whose elements are one constant."""
    made = value.op
    while made is not None and not value.is_argument and made.kind == "tt.splat":
        value = made.operands[0]
        made = value.op
    is_constant = made is not None and not value.is_argument and made.kind == "arith.constant"
    return int(constant(made)) if is_constant and made is not None else None


def _broadcast(op: Op, operands: list[Strides]) -> Strides:
    return {d: x for d, x in operands[0].items() if op.operands[0].shape[d] > 1}


def _expand_dims(op: Op, operands: list[Strides]) -> Strides:
    return {d + (d >= op.attributes["axis"]): x for d, x in operands[0].items()}


def _transpose(op: Op, operands: list[Strides]) -> Strides:
    return {op.attributes["order"].index(d): x for d, x in operands[0].items()}


def _same(op: Op, operands: list[Strides]) -> Strides:
    return operands[0]


_RULES: dict[str, Callable[[Op, list[Strides]], Strides | None]] = {
    "arith.addi": _sum,
    "arith.constant": lambda op, operands: {},
    "arith.extsi": _same,
    "arith.muli": _product,
    "arith.subi": _sum,
    "arith.trunci": lambda op, operands: operands[0] if op.result.element == "i32" else None,
    "tt.addptr": _sum,
    "tt.bitcast": _same,
    "tt.broadcast": _broadcast,
    "tt.expand_dims": _expand_dims,
    "tt.make_range": lambda op, operands: {0: 1},
    "tt.splat": _same,
    "tt.trans": _transpose,
}
