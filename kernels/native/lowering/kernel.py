"""From a kernel's TTIR to the text of an LLVM module: one function that runs one program of the grid.

    tt.func @add(%p, %n)                   define internal void @program(ptr %arguments, i32 %i0, i32 %i1, i32 %i2,
      %i = tt.get_program_id x                                                           i32 %n0, i32 %n1, i32 %n2)
      ...                            ->      %a0 = load ptr, ptr %arguments
      tt.store %addresses, %y, %mask         ... loops over the tile, vectors inside ...

Ops of a block are taken in order. Scalars are written where they stand. Tiles are formulas (`tiles.py`) until something must
happen: a store, a reduction, a tile that is to be kept (`analysis.py`). These roots wait in a group as long as they may share
a loop; an op that needs their result, or that is itself a statement (a loop, a product), has the group written first.
"""

import math
from collections.abc import Callable

from ..machine import Machine
from ..ttir import Block, Function, Op, UnsupportedOpError, Value
from . import control, products, statements
from .analysis import Analysis, is_formula
from .builder import Builder
from .elements import in_memory, llvm_type, pointee, size
from .elementwise import INSTRUCTIONS
from .failures import Failures, can_fail
from .groups import Reduction, Root, Store, Write, emit_group, may_share_loop, operation
from .lanes import Uniform
from .tiles import FORMULAS, Buffer, Tiles


def lower(
    function: Function,
    aliases: dict[int, int],
    machine: Machine,
    *,
    check_bounds: bool = False,
    large: frozenset[int] = frozenset(),
) -> str:
    """The LLVM module of a kernel. `aliases` maps the number of a pointer argument to a class of those that share memory.

    With `check_bounds` no access leaves the memory of the tensor that its pointer comes from (`failures.py`). What is written
    into tensors whose arguments have the numbers `large`, and not read, goes around the caches.
    """
    return Kernel(function, aliases, machine, check_bounds, large).module()


# Of a program's tiles, on a thread whose stack may be of no more than 1 MiB; attention wants 608 KiB.
MOST_STACK_BYTES = 640 * 2**10


class Kernel:
    """A kernel that is being written. `frames` are the regions around the point of writing."""

    def __init__(
        self,
        function: Function,
        aliases: dict[int, int],
        machine: Machine,
        check_bounds: bool,
        large: frozenset[int],
    ) -> None:
        self.function, self.check_bounds = function, check_bounds
        self.b = Builder(machine)
        self.tiles = Tiles(self.b)
        self.analysis = Analysis(function, aliases, machine, large)
        self.kept = self.analysis.kept
        self.frames: list[control.Frame] = []
        self.stack_bytes = 0
        self.on_heap: list[str] = []
        self.panels: dict[tuple[str, int], str] = {}
        self.failures = Failures(self)
        if check_bounds:
            self.tiles.narrow = self.failures.narrow

    def module(self) -> str:
        arguments = []
        for number, argument in enumerate(self.function.arguments):
            kind = llvm_type(argument.element)
            arguments.append(f"  %slot{number} = getelementptr i64, ptr %arguments, i64 {number}")
            arguments.append(f"  %a{number} = load {kind}, ptr %slot{number}, align 8")
            self.tiles.stored[argument] = Uniform(f"%a{number}")
        if can_fail(self.function, self.check_bounds):
            arguments += self.failures.load_slots()
        for number, block in enumerate(self.function.blocks):
            if number:
                self.b.place(f"block.{block.label}")
            with self.b.scope():
                self.block(block)
        grid = ", ".join(f"i32 %{name}{axis}" for name in "in" for axis in range(3))
        return "\n".join(
            [
                f'target triple = "{self.b.machine.triple}"',
                "@lf.zeros = internal constant [64 x i8] zeroinitializer, align 64",
                "@lf.sink = internal global [64 x i8] zeroinitializer, align 64",
                *self.b.definitions.values(),
                f"define internal void @program(ptr noalias readonly %arguments, {grid}) #0 {{",
                "entry:",
                *self.b.allocas,
                *arguments,
                *self.b.lines,
                f"{control.LEAVE}:",
                *(f"  call void @free(ptr {buffer})" for buffer in self.on_heap),
                "  ret void",
                "}",
                *self.b.declarations.values(),
                f"attributes #0 = {{ {self.b.machine.function_attributes} }}",
            ]
        )

    def buffer(self, value: Value) -> str:
        """Memory for a tile: on the stack of the thread that runs the program, as long as there is certainly room."""
        element, count = in_memory(value.element), math.prod(value.shape)
        wanted = -(-count * size(element) // 64) * 64
        if self.stack_bytes + wanted <= MOST_STACK_BYTES:
            self.stack_bytes += wanted
            return self.b.alloca(f"[{count} x {llvm_type(element)}]", "tile")
        self.on_heap.append(name := self.b.name("tile"))
        self.b.allocas.append(f"  {name} = call noalias align 64 ptr @aligned_alloc(i64 64, i64 {wanted})")
        self.b.declarations |= {
            "aligned_alloc": "declare ptr @aligned_alloc(i64, i64)",
            "free": "declare void @free(ptr)",
        }
        return name

    def panel(self, role: str, words: int) -> str:
        """Memory into which one product after the other packs its left or right operand."""
        if (role, words) not in self.panels:
            self.panels[role, words] = self.buffer(Value(role, (words,), "i32"))
        return self.panels[role, words]

    def consumers(self, value: Value) -> set[Op]:
        return set(self.analysis.consumers(value))

    def block(self, block: Block) -> None:
        """Writes a block's ops; it ends in a yield, a branch or a return, which has the last group written."""
        waiting: list[Root] = []

        def flush() -> None:
            if waiting:
                roots = [root for root in waiting if not self.is_used_up(root, waiting)]
                unkept = [root for root in waiting if isinstance(root, Write) and root not in roots]
                loaded = [root.value for root in unkept if operation(root).kind == "tt.load"]
                waiting.clear()
                emit_group(self, roots, loaded)
                for root in roots:
                    if isinstance(root, Write):
                        self.tiles.stored[root.value] = Buffer(root.buffer)

        for op in block.ops:
            try:
                check_supported(op)
                root = self.root(op)
                if root is not None:
                    if waiting and not self.may_share_loop(waiting, root):
                        flush()
                    waiting.append(root)
                elif not is_formula(op):
                    if op.kind == "scf.yield":
                        waiting += self.yielded_with(waiting, op)
                    if op.kind in STATEMENTS or self.needs(op, waiting):
                        flush()
                    self.statement(op)
            except NotImplementedError as error:
                if isinstance(error, UnsupportedOpError):
                    raise
                raise UnsupportedOpError(
                    f"{self.function.name}, {op.location}: {error} is not compiled for the CPU"
                ) from error
        flush()

    def root(self, op: Op) -> Root | None:
        """What a loop is to be written for; None for what needs none, or has loops of its own."""
        if is_formula(op):
            return Write(op.result, self.buffer(op.result)) if op.result in self.kept else None
        if op.kind == "tt.store" and op.operands[0].shape:
            return Store(op)
        return Reduction(op) if op.kind == "tt.reduce" else None

    def may_share_loop(self, waiting: list[Root], root: Root) -> bool:
        return (
            may_share_loop(waiting, root)
            and not self.needs(operation(root), waiting)
            and all(self.analysis.may_share_loop(operation(other), operation(root)) for other in waiting)
            and not any(
                isinstance(other, Write) and self.analysis.moves(operation(root), other.value) for other in waiting
            )
        )

    def yielded_with(self, waiting: list[Root], op: Op) -> list[Root]:
        """What a loop carries on and may be written in the loop of the waiting roots, which read nothing of what it overwrites."""
        found: list[Root] = []
        for write in control.independent_writes(self, op) if waiting else ():
            read = {buffer for root in waiting for value in root.values for buffer in control.buffers_read(self, value)}
            if write.buffer not in read and self.may_share_loop([*waiting, *found], write):
                found.append(write)
        return found

    def is_used_up(self, root: Root, group: list[Root]) -> bool:
        """Whether a tile that is to be kept is consumed by the other roots of its loop alone, each of which computes it."""
        others = {operation(other) for other in group if other is not root}
        return isinstance(root, Write) and root.value not in self.analysis.deep and self.consumers(root.value) <= others

    def needs(self, op: Op, waiting: list[Root]) -> bool:
        """Whether `op` reads what a waiting store or reduction is still to give. (A kept tile's formula gives it as well.)"""
        ops = {root.op for root in waiting if not isinstance(root, Write)}
        results = {result for each in ops for result in each.results}
        results |= {root.value for root in waiting if isinstance(root, Write) and root.value in self.analysis.deep}
        return self._reads(op, results, set())

    def _reads(self, op: Op, results: set[Value], seen: set[Op]) -> bool:
        if op in seen:
            return False
        seen.add(op)
        return any(
            operand in results
            or (
                operand not in self.tiles.stored
                and operand.op is not None
                and not operand.is_argument
                and is_formula(operand.op)
                and self._reads(operand.op, results, seen)
            )
            for operand in op.operands
        )

    def statement(self, op: Op) -> None:
        if op.kind in STATEMENTS:
            STATEMENTS[op.kind](self, op)
        else:
            statements.emit_scalar(self, op)


def check_supported(op: Op) -> None:
    """Raises `NotImplementedError` for ops and element types that are not known."""
    if op.kind not in STATEMENTS and op.kind not in SCALARS and op.kind not in FORMULAS | INSTRUCTIONS:
        raise NotImplementedError(op.kind)
    for value in (*op.operands, *op.results):
        llvm_type(pointee(value.element))


SCALARS = {"tt.get_program_id", "tt.get_num_programs", "tt.reduce"}
STATEMENTS: dict[str, Callable[[Kernel, Op], None]] = {
    "cf.br": control.emit_branch,
    "cf.cond_br": control.emit_branch,
    "scf.condition": control.emit_condition,
    "scf.for": control.emit_for,
    "scf.if": control.emit_if,
    "scf.while": control.emit_while,
    "scf.yield": control.emit_yield,
    "tt.assert": statements.emit_assert,
    "tt.atomic_cas": statements.emit_atomic,
    "tt.atomic_rmw": statements.emit_atomic,
    "tt.cat": statements.emit_cat,
    "tt.dot": products.emit_dot,
    "tt.grid_dependency_launch_dependents": statements.emit_nothing,
    "tt.grid_dependency_wait": statements.emit_nothing,
    "tt.histogram": statements.emit_histogram,
    "tt.load": statements.emit_load,
    "tt.print": statements.emit_print,
    "tt.return": control.emit_return,
    "tt.scan": control.emit_scan,
    "tt.store": statements.emit_store,
    "ttg.barrier": statements.emit_nothing,
    "gpu.barrier": statements.emit_nothing,
}
"""Ops with loops or effects of their own, on tiles or scalars. Everything before them is written first."""
