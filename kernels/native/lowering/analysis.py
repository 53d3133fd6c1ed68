"""Which tiles are kept in memory. All others are formulas (`tiles.py`), computed in the loop that consumes them.

A tile is kept where computing it at its consumer would be wrong or slow:

- it was loaded before a store that may write the same memory, and is consumed after it (in-place kernels);
- it is an operand of a product or of a gather, and is not simply loaded: each element would be computed many times;
- it holds an exp or a division and more than one loop consumes it, or one that runs more often than it;
- its formula has grown large and more than one loop consumes it (a sorting network doubles it at every step).

What a loop carries from one iteration to the next is kept too, by `control.py`.
"""

import math
from collections.abc import Iterator

from ..ttir import Function, Op, Value
from .elements import is_pointer
from .elementwise import INSTRUCTIONS
from .tiles import FORMULAS

EXPENSIVE = {
    "arith.divf", "math.cos", "math.erf", "math.exp", "math.exp2", "math.log", "math.log2", "math.rsqrt", "math.sin", "math.sqrt",
    "math.tanh", "tt.extern_elementwise", "tt.gather", "tt.precise_divf", "tt.precise_sqrt",
}  # fmt: skip
LARGE = 100  # ops of a formula
WRITES = {"tt.store", "tt.atomic_rmw", "tt.atomic_cas"}


def is_formula(op: Op) -> bool:
    """Whether the op's result is a tile that need not be kept."""
    return bool(op.results) and op.result.shape != () and (op.kind in FORMULAS or op.kind in INSTRUCTIONS)


class Analysis:
    """`kept`: the tiles to keep. `aliases` maps a pointer argument's number to the class of those that share memory with it."""

    def __init__(self, function: Function, aliases: dict[int, int]) -> None:
        self.classes = {
            argument: aliases.get(number, number)
            for number, argument in enumerate(function.arguments)
            if is_pointer(argument.element)
        }
        ops = list(function.ops())
        self.writes = [op for op in ops if op.kind in WRITES]
        self.kept = set(self.operands_of_products(ops))
        self.sizes: dict[Value, int] = {}
        for op in ops:
            if is_formula(op):
                self.sizes[op.result] = min(10**6, 1 + sum(self.sizes.get(operand, 1) for operand in op.operands))
        for op in reversed(ops):  # consumers first: what they keep ends a formula
            if (
                is_formula(op)
                and not is_pointer(op.result.element)
                and math.prod(op.result.shape) > 1
                and self.must_keep(op)
            ):
                self.kept.add(op.result)

    def operands_of_products(self, ops: list[Op]) -> Iterator[Value]:
        for op in ops:
            if op.kind in ("tt.dot", "tt.gather"):
                for operand in op.operands[: 2 if op.kind == "tt.dot" else 1]:
                    source = operand
                    while source.op is not None and not source.is_argument and source.op.kind == "tt.trans":
                        source = source.op.operands[0]
                    made = source.op
                    if (
                        made is None
                        or source.is_argument
                        or not is_formula(made)
                        or (made.kind == "tt.load" and op.kind == "tt.dot")
                    ):
                        continue
                    yield source

    def must_keep(self, op: Op) -> bool:
        if op.kind == "tt.load":
            return self.is_overwritten(op)
        if op.kind in EXPENSIVE:
            consumers = self.consumers(op.result)
            return len(consumers) > 1 or any(
                consumer.ancestors != op.ancestors or consumer.kind == "tt.dot" for consumer in consumers
            )
        return self.sizes[op.result] > LARGE and len(self.consumers(op.result)) > 1

    def is_overwritten(self, load: Op) -> bool:
        """Whether a store between the load and a consumer may change what was loaded."""
        for consumer in self.consumers(load.result):
            loops = [op for op in consumer.ancestors if op not in load.ancestors]
            for write in self.writes:
                if (write is consumer and write.kind == "tt.store") or not self.may_alias(load, write):
                    continue
                if load.order < write.order <= consumer.order or any(loop in write.ancestors for loop in loops):
                    return True
        return False

    def may_alias(self, load: Op, write: Op) -> bool:
        left, right = self.memory(load.operands[0]), self.memory(write.operands[0])
        return left is None or right is None or left == right

    def memory(self, pointer: Value) -> int | None:
        """The alias class of the argument that a pointer was made from, None where it cannot be told."""
        while pointer not in self.classes:
            op = pointer.op
            if op is None:
                return None
            if op.kind == "scf.for":
                pointer = op.operands[3 + pointer.position - (1 if pointer.is_argument else 0)]
            elif op.kind in (
                "tt.addptr",
                "tt.splat",
                "tt.broadcast",
                "tt.expand_dims",
                "tt.trans",
                "tt.reshape",
                "tt.bitcast",
            ):
                pointer = op.operands[0]
            else:
                return None
        return self.classes[pointer]

    def consumers(self, value: Value) -> list[Op]:
        """The ops that end the formulas `value` is part of: stores, reductions, products, loops, or what is kept itself."""
        found: dict[Op, None] = {}
        seen: set[Op] = set()

        def follow(current: Value) -> None:
            for op in current.uses:
                if op in seen:
                    continue
                seen.add(op)
                if is_formula(op) and not any(result in self.kept for result in op.results):
                    for result in op.results:
                        follow(result)
                else:
                    found[op] = None

        follow(value)
        return list(found)
