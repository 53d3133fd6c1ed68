"""Which tiles are kept in memory. All others are formulas (`tiles.py`), computed in the loop that consumes them.

A tile is kept where computing it at its consumer would be wrong or slow:

- it was loaded before a store that may write the same memory, and is consumed after it (in-place kernels), or by it, where
  the store writes one place for several elements; so too before an atomic that releases memory to other programs;
- it is an operand of a product or of a gather, and is not simply loaded: each element would be computed many times;
- it is loaded before a loop whose products pack it (`products/`), and would be packed anew each time;
- it holds an exp or a division and more than one loop consumes it, or one that runs more often than it;
- its formula has grown large and more than one loop consumes it (a sorting network doubles it at every step), or deep.

What a loop carries from one iteration to the next is kept too, by `control.py`.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..machine import Machine
from ..ttir import Function, Op, Value
from .elements import is_pointer
from .elementwise import INSTRUCTIONS
from .places import are_distinct
from .products.operands import is_packed
from .tiles import FORMULAS
from .views import MOVES

EXPENSIVE = {
    "arith.divf", "math.cos", "math.erf", "math.exp", "math.exp2", "math.log", "math.log2", "math.rsqrt", "math.sin", "math.sqrt",
    "math.tanh", "tt.extern_elementwise", "tt.gather", "tt.precise_divf", "tt.precise_sqrt",
}  # fmt: skip
LARGE = 100  # ops of a formula
MOST_TERMS = 16  # of an address
DEEP = 100  # ops from a formula's end to its beginning: each is a call of a call when it is written
READS = {"tt.load", "tt.atomic_rmw", "tt.atomic_cas"}
WRITES = {"tt.store", "tt.atomic_rmw", "tt.atomic_cas"}


def is_formula(op: Op) -> bool:
    """Whether the op's result is a tile that need not be kept."""
    known = op.kind in FORMULAS or op.kind in INSTRUCTIONS
    return known and bool(op.results) and op.result.shape != () and not op.attributes.get("isVolatile")


def is_release(op: Op) -> bool:
    """Whether other programs that see this atomic may write what was loaded before it."""
    return op.kind.startswith("tt.atomic") and not {"acq_rel", "release"}.isdisjoint(op.attributes["words"])


class Analysis:
    """`kept`: the tiles to keep. `aliases` maps a pointer argument's number to the class of those that share memory with it.

    `large` are the numbers of pointers to tensors that caches do not hold until somebody reads them.
    """

    def __init__(
        self, function: Function, aliases: dict[int, int], machine: Machine, large: frozenset[int] = frozenset()
    ) -> None:
        self.machine = machine
        self.large = {aliases.get(number, number) for number in large}
        self.classes = {
            argument: aliases.get(number, number)
            for number, argument in enumerate(function.arguments)
            if is_pointer(argument.element)
        }
        ops = list(function.ops())
        self.writes = [op for op in ops if op.kind in WRITES]
        self.reads_memory = [op for op in ops if op.kind in READS]
        self.kept = set(self.operands_of_products(ops))
        self.sizes: dict[Value, int] = {}
        self.depths: dict[Value, int] = {}
        self.deep: set[Value] = set()
        for op in ops:
            if is_formula(op):
                size = min(10**6, 1 + sum(self.sizes.get(operand, 1) for operand in op.operands))
                depth = 1 + max((self.depths.get(operand, 0) for operand in op.operands), default=0)
                self.sizes.update(dict.fromkeys(op.results, size))
                self.depths.update(dict.fromkeys(op.results, depth % DEEP))
        for op in reversed(ops):  # consumers first: what they keep ends a formula
            if (
                is_formula(op)
                and not is_pointer(op.result.element)
                and (op.kind == "tt.load" or math.prod(op.result.shape) > 1)
                and self.must_keep(op)
            ):
                self.kept.add(op.result)

    def operands_of_products(self, ops: list[Op]) -> Iterator[Value]:
        for op in ops:
            if op.kind in ("tt.dot", "tt.gather"):
                for operand in op.operands[: 2 if op.kind == "tt.dot" else 1]:
                    source = operand
                    while (
                        source.op is not None and not source.is_argument and source.op.kind in ("tt.split", "tt.trans")
                    ):
                        source = source.op.operands[0]
                    made = source.op
                    if made is None or source.is_argument or not is_formula(made):
                        continue
                    if made.kind == "tt.load" and op.kind == "tt.dot" and not self.is_packed_in_loop(operand, op):
                        continue
                    yield source

    def is_packed_in_loop(self, operand: Value, product: Op) -> bool:
        """Whether a loaded operand lies as a product in a later loop packs it: the left one, row by row."""
        made = operand.op
        assert made is not None
        return (
            operand is product.operands[0]
            and made.kind == "tt.load"
            and made.ancestors != product.ancestors
            and is_packed(product, self.machine)
        )

    def must_keep(self, op: Op) -> bool:
        if op.kind == "tt.load":
            return self.is_overwritten(op)
        if op.kind in EXPENSIVE:
            consumers = self.consumers(op.result)
            return len(consumers) > 1 or any(
                consumer.ancestors != op.ancestors or consumer.kind == "tt.dot" for consumer in consumers
            )
        if op.kind == "tt.split":
            return False
        if self.depths[op.result] == DEEP - 1:
            self.deep.add(op.result)
            return True
        return self.sizes[op.result] > LARGE and len(self.consumers(op.result)) > 1

    def is_overwritten(self, load: Op) -> bool:
        """Whether a store between the load and a consumer may change what was loaded."""
        for consumer in self.consumers(load.result):
            loops = [op for op in consumer.ancestors if op not in load.ancestors]
            for write in self.writes:
                aliases = self.may_alias(load, write)
                if not aliases and not is_release(write):
                    continue
                if write is consumer and not loops and not (aliases and self.crosses(write, consumer, load)):
                    continue  # each element is read just before it is written
                if load.order < write.order <= consumer.order or any(loop in write.ancestors for loop in loops):
                    return True
        return False

    def may_share_loop(self, root: Op, other: Op) -> bool:
        """Whether neither overwrites, element by element, what the other has still to read, or has written."""
        if root.kind == other.kind == "tt.store" and self.may_overwrite(root, other):
            return False
        pairs = [(write, reader) for write, reader in ((root, other), (other, root)) if write.kind == "tt.store"]
        return not any(
            self.may_alias(load, write) and self.crosses(write, reader, load)
            for write, reader in pairs
            for load in self.loads(reader)
        )

    def may_overwrite(self, store: Op, other: Op) -> bool:
        """Whether both may write one place, from different elements."""
        left, right = store.operands[0], other.operands[0]
        in_order = are_distinct(left) if left is right else is_shifted(left, right)
        return self.may_alias(store, other) and not in_order

    def crosses(self, write: Op, reader: Op, load: Op) -> bool:
        """Whether `reader` uses what it loads for other elements than those `write` writes to the same places."""
        return (
            write.kind != "tt.store"
            or load.operands[0] is not write.operands[0]
            or not are_distinct(write.operands[0])
            or self.loads(reader).get(load, False)
        )

    def loads(self, op: Op) -> dict[Op, bool]:
        """The loads in what `op` consumes (or is, a kept tile), with whether their elements are used at other places."""
        found: dict[Op, bool] = {op: False} if op.kind == "tt.load" else {}
        for value, moved in self.reads(op):
            if value.op is not None and value.op.kind == "tt.load" and value not in self.kept:
                found[value.op] = found.get(value.op, False) or moved
        return found

    def moves(self, op: Op, kept: Value) -> bool:
        """Whether `op` uses elements of a kept tile at other places than its own."""
        return (kept, True) in self.reads(op)

    def reads(self, op: Op) -> set[tuple[Value, bool]]:
        """The tiles in what `op` consumes, down to loads and kept ones, with whether their elements are used at other places."""
        found: set[tuple[Value, bool]] = set()
        waiting = [(op, False)]
        while waiting:
            current, moved = waiting.pop()
            moved = moved or current.kind in MOVES
            for operand in current.operands:
                made = operand.op
                if made is None or operand.is_argument or not is_formula(made) or (operand, moved) in found:
                    continue
                found.add((operand, moved))
                if operand not in self.kept:
                    waiting.append((made, moved))
        return found

    def may_alias(self, access: Op, write: Op) -> bool:
        left, right = self.memory(access.operands[0]), self.memory(write.operands[0])
        return left is None or right is None or bool(left & right)

    def streams(self, store: Op) -> bool:
        """Whether a store goes around the caches: it is into large tensors, and this kernel reads nothing of them.

        Where the address was loaded it is some places that are written, such as the slots of a cache.
        """
        written = self.memory(store.operands[0])
        return (
            written is not None
            and written <= self.large
            and not any(self.may_alias(read, store) for read in self.reads_memory)
            and not follows_from_memory(store.operands[0])
        )

    def memory(self, pointer: Value) -> set[int] | None:
        """The alias classes of the arguments that a pointer may be made from, None where it cannot be told."""
        arguments = origins(pointer)
        return None if arguments is None else {self.classes[argument] for argument in arguments}

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


def origins(pointer: Value) -> list[Value] | None:
    """The kernel's arguments that a pointer may be made from, None where it cannot be told (a pointer that was loaded)."""
    found: dict[Value, None] = {}
    seen: set[Value] = set()
    waiting = [pointer]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op is None:
            if value.is_argument:
                return None
            found[value] = None
            continue
        sources = _sources(value, value.op)
        if sources is None:
            return None
        waiting += sources
    return list(found)


def follows_from_memory(value: Value) -> bool:
    """Whether something that was loaded is in a value's formula."""
    seen: set[Op] = set()
    waiting = [value]
    while waiting:
        op = waiting.pop().op
        if op is None or op in seen:
            continue
        if op.kind in READS:
            return True
        seen.add(op)
        waiting += op.operands
    return False


def is_shifted(left: Value, right: Value) -> bool:
    """Whether two tiles of pointers into one argument differ by the same in every element: halves of a row.

    Stores to such places share a loop. Where they overlap it matters in which order they come, and that is so on a GPU too,
    where only a barrier puts stores of different threads in order.
    """
    arguments = origins(left)
    one = arguments is not None and len(arguments) == 1 and origins(right) == arguments
    known: dict[Value, Counter[Any]] = {}
    return one and _terms(left, known) == _terms(right, known)


def _terms(value: Value, known: dict[Value, Counter[Any]]) -> Counter[Any]:
    """The summands of an address that are not the same in every element, with what they are multiplied by."""
    if value not in known:
        terms = _summands(value, known)  # as many again at each level, where a sum is added to a multiple of itself
        known[value] = terms if len(terms) <= MOST_TERMS else Counter({value: 1})
    return known[value]


def _summands(value: Value, known: dict[Value, Counter[Any]]) -> Counter[Any]:
    op = value.op
    if op is None or value.is_argument or op.kind in ("arith.constant", "tt.splat"):
        return Counter({value: 1}) if op is not None and value.is_argument else Counter()
    if op.kind in ("arith.addi", "tt.addptr"):
        return _terms(op.operands[0], known) + _terms(op.operands[1], known)
    if op.kind in ("arith.extsi", "tt.broadcast", "tt.expand_dims"):
        return Counter({(op.kind, value.shape, term): n for term, n in _terms(op.operands[0], known).items()})
    if op.kind == "arith.muli":
        for factor, other in (op.operands, op.operands[::-1]):
            if not _terms(factor, known):
                return Counter({("arith.muli", factor, term): n for term, n in _terms(other, known).items()})
    return Counter({value: 1})


def _sources(value: Value, op: Op) -> list[Value] | None:
    """The values that a pointer is made from in one step."""
    if op.kind == "scf.for":
        carried = value.position - (1 if value.is_argument else 0)
        return [op.operands[3 + carried], op.regions[0][-1].ops[-1].operands[carried]]
    if op.kind == "scf.if":
        return [region[-1].ops[-1].operands[value.position] for region in op.regions]
    if op.kind == "scf.while":
        (before,), (after,) = op.regions
        if value in before.arguments:
            return [op.operands[value.position], after.ops[-1].operands[value.position]]
        return [before.ops[-1].operands[1 + value.position]]
    if op.kind == "arith.select":
        return op.operands[1:]
    if op.kind in ("tt.cat", "tt.join"):
        return op.operands
    if op.kind in MOVES | {"tt.addptr", "tt.bitcast", "tt.splat"}:
        return op.operands[:1]
    return None
