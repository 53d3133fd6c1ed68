"""Writes one LLVM function as text: instructions, intrinsics and their declarations, loops, and index arithmetic.

Index arithmetic is 64 bits wide, wraps around (a kernel's own integers are computed with it too), and folds Python numbers, so
that `b.add(b.mul(i, 4), 0)` is one instruction when `i` is a name and none when it is a number:

    b.loop(0, n, 16, body)    ->    head:  %i = phi i64 [ 0, %pre ], [ %next, %latch ]
                                           %more = icmp slt i64 %i, %n
                                           br i1 %more, label %body, label %done
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..machine import Machine
from .elements import Operand, literal, llvm_type, vector_type, wrapped

Body = Callable[[Operand], None]


class Builder:
    """The text of a function that is being written.

    `memo` holds what was computed in the blocks that dominate the point of writing; a loop's body has a scope of its own.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.lines: list[str] = []
        self.allocas: list[str] = []
        self.declarations: dict[str, str] = {}
        self.definitions: dict[str, str] = {}
        self._scopes: list[dict[Any, Any]] = [{}]
        self._names = 0

    @property
    def lanes(self) -> int:
        """float32 lanes of a vector register."""
        return self.machine.vector_bytes // 4

    # -- instructions

    def name(self, hint: str) -> str:
        self._names += 1
        return f"%{hint}.{self._names}"  # arguments and slots have names without a dot

    def emit(self, instruction: str) -> None:
        self.lines.append("  " + instruction)

    def let(self, instruction: str, hint: str = "t") -> str:
        name = self.name(hint)
        self.lines.append(f"  {name} = {instruction}")
        return name

    def call(self, result: str, function: str, *arguments: tuple[str, Operand]) -> str:
        """Calls an intrinsic or a function of the process, and declares it."""
        types = ", ".join(kind for kind, _ in arguments)
        self.declarations[function] = f"declare {result} @{function}({types})"
        call = f"call {result} @{function}({', '.join(f'{kind} {operand}' for kind, operand in arguments)})"
        if result != "void":
            return self.let(call)
        self.emit(call)
        return ""

    def alloca(self, kind: str, hint: str = "slot") -> str:
        """Memory of this program, allocated once at the function's entry."""
        name = self.name(hint)
        self.allocas.append(f"  {name} = alloca {kind}, align 64")
        return name

    def label(self, hint: str) -> str:
        self._names += 1
        return f"{hint}{self._names}"

    def place(self, label: str) -> None:
        self.lines.append(f"{label}:")

    def branch(self, label: str) -> None:
        self.emit(f"br label %{label}")

    def branch_if(self, condition: Operand, then: str, otherwise: str) -> None:
        self.emit(f"br i1 {literal(condition, 'i1')}, label %{then}, label %{otherwise}")

    # -- what is known at the point of writing

    @contextmanager
    def scope(self) -> Iterator[None]:
        self._scopes.append({})
        try:
            yield
        finally:
            self._scopes.pop()

    def remember(self, key: Any, compute: Callable[[], Any]) -> Any:
        for scope in reversed(self._scopes):
            if key in scope:
                return scope[key]
        value = self._scopes[-1][key] = compute()
        return value

    @contextmanager
    def trial(self) -> Iterator[None]:
        """What is written inside is forgotten: to ask what something would be."""
        written = len(self.lines)
        with self.scope():
            yield
        del self.lines[written:]

    # -- index arithmetic

    def add(self, a: Operand, b: Operand) -> Operand:
        if isinstance(a, int) and isinstance(b, int):
            return wrapped(a + b)
        return b if a == 0 else a if b == 0 else self.let(f"add i64 {a}, {b}")

    def sub(self, a: Operand, b: Operand) -> Operand:
        if isinstance(a, int) and isinstance(b, int):
            return wrapped(a - b)
        return a if b == 0 else self.let(f"sub i64 {a}, {b}")

    def mul(self, a: Operand, b: Operand) -> Operand:
        if isinstance(a, int) and isinstance(b, int):
            return wrapped(a * b)
        if a == 0 or b == 0:
            return 0
        return b if a == 1 else a if b == 1 else self.let(f"mul i64 {a}, {b}")

    def div(self, a: Operand, b: int) -> Operand:
        """`a` and `b` are not negative."""
        return a // b if isinstance(a, int) else a if b == 1 else self.let(f"udiv i64 {a}, {b}")

    def rem(self, a: Operand, b: int) -> Operand:
        """`a` and `b` are not negative."""
        return a % b if isinstance(a, int) else 0 if b == 1 else self.let(f"urem i64 {a}, {b}")

    def min(self, a: Operand, b: Operand) -> Operand:
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return a if a == b else self.call("i64", "llvm.smin.i64", ("i64", a), ("i64", b))

    def max(self, a: Operand, b: Operand) -> Operand:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return a if a == b else self.call("i64", "llvm.smax.i64", ("i64", a), ("i64", b))

    def clamp(self, a: Operand, low: Operand, high: Operand) -> Operand:
        return self.min(self.max(a, low), high)

    def round_down(self, a: Operand, multiple: int) -> Operand:
        """To a multiple that is a power of two."""
        return a // multiple * multiple if isinstance(a, int) else self.let(f"and i64 {a}, {-multiple}")

    def round_up(self, a: Operand, multiple: int) -> Operand:
        """To a multiple that is a power of two."""
        return self.round_down(self.add(a, multiple - 1), multiple) if multiple > 1 else a

    # -- loops

    def loop(self, low: Operand, high: Operand, step: int, body: Body, *, unroll: bool = False) -> None:
        """`body(i)` for i = low, low + step, ... below high."""
        if isinstance(low, int) and isinstance(high, int) and (unroll or high - low <= step):
            for known in range(low, high, step):
                body(known)
            return
        before, head, inside, done = (self.label(hint) for hint in ("before", "head", "inside", "done"))
        self.branch(before)
        self.place(before)
        self.branch(head)
        self.place(head)
        i = self.name("i")
        phi = len(self.lines)
        self.lines.append("")
        self.branch_if(self.let(f"icmp slt i64 {i}, {high}"), inside, done)
        self.place(inside)
        with self.scope():
            body(i)
        latch = self.label("latch")
        self.branch(latch)
        self.place(latch)
        following = self.let(f"add nsw i64 {i}, {step}")
        self.branch(head)
        self.lines[phi] = f"  {i} = phi i64 [ {low}, %{before} ], [ {following}, %{latch} ]"
        self.place(done)

    def blocks(self, low: Operand, high: Operand, sizes: tuple[int, ...], body: Callable[[Operand, int], None]) -> None:
        """`body(i, size)` over [low, high) in blocks of the largest size, and what remains in the smaller ones; the last is 1."""
        start = low
        for size in sizes:
            end = self.add(start, self.round_to(self.sub(high, start), size))

            def block(i: Operand, size: int = size) -> None:
                body(i, size)

            self.loop(start, end, size, block)
            start = end

    def round_to(self, n: Operand, multiple: int) -> Operand:
        """`n`, not negative, down to a multiple of any number."""
        return n if multiple == 1 else self.sub(n, self.rem(n, multiple))

    # -- vectors

    def splat(self, x: str, element: str, width: int) -> str:
        """An SSA scalar in every lane."""
        if width == 1:
            return x
        kind = vector_type(element, width)
        first = self.let(f"insertelement {kind} poison, {llvm_type(element)} {x}, i64 0")
        return self.let(f"shufflevector {kind} {first}, {kind} poison, <{width} x i32> zeroinitializer")

    def shuffle(self, a: str, b: str, kind: str, order: list[int]) -> str:
        mask = ", ".join(f"i32 {i}" for i in order)
        return self.let(f"shufflevector {kind} {a}, {kind} {b}, <{len(order)} x i32> <{mask}>")
