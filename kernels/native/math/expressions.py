"""LLVM IR of arithmetic, written as arithmetic: what `math.py` writes its formulas with.

A `Value` is one SSA value of a `Body`, the straight-line code of one function; an operator on values appends an instruction
and gives its result. Python numbers become constants, the same in every lane. With `x` of type `<4 x float>`

    where(x < 0.0, fma(x, 0.5, 1.0), x * 2.0)

appends

    %0 = fcmp olt <4 x float> %x, splat (float 0x0000000000000000)
    %1 = call <4 x float> @llvm.fma.v4f32(<4 x float> %x, <4 x float> splat (float 0x3FE0000000000000), ...)
    %2 = fmul <4 x float> %x, splat (float 0x4000000000000000)
    %3 = select <4 x i1> %0, <4 x float> %1, <4 x float> %2

Intrinsics are not declared: LLVM declares them by itself, and a module may hold many functions that use the same one.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..machine import Machine


@dataclass(frozen=True)
class Element:
    """A floating-point format, and what LLVM calls it."""

    name: str
    type: str
    bits: int
    mantissa_bits: int  # stored, without the leading one
    bias: int
    exact_bits: int  # of a constant below 1 whose product with any exponent is exact
    largest_angle: float  # that is reduced by three floats of pi

    @property
    def shift(self) -> float:
        """Added to an x that is not large it rounds x to an integer n, and the lowest bits of the sum are n + 2 * bias."""
        return 1.5 * 2.0**self.mantissa_bits + 2 * self.bias

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def top(self) -> int:
        """2^top is the smallest power of two that is infinity."""
        return self.bias + 1

    @property
    def bottom(self) -> int:
        """2^bottom is the largest that is rounded to 0."""
        return -self.bias - self.mantissa_bits

    def rounded(self, value: float) -> float:
        return struct.unpack("f", struct.pack("f", value))[0] if self.bits == 32 else value

    def constant(self, value: float) -> str:
        """As LLVM spells it: the 64 bits of the double, for a float too."""
        return f"{self.type} 0x{struct.unpack('<Q', struct.pack('<d', self.rounded(value)))[0]:016X}"


ELEMENTS = {
    "f32": Element("f32", "float", 32, mantissa_bits=23, bias=127, exact_bits=15, largest_angle=2.0**17),
    "f64": Element("f64", "double", 64, mantissa_bits=52, bias=1023, exact_bits=41, largest_angle=2.0**30),
}


class Body:
    """The instructions of one function of `width` lanes, in the order they were written."""

    def __init__(self, element: Element, width: int, machine: Machine) -> None:
        self.element, self.width, self.machine = element, width, machine
        self.lines: list[str] = []
        self.values = 0
        self.called: list[str] = []  # definitions of functions that this one calls
        self.argument = Value(self, "float", "%x")

    def type_of(self, kind: str, width: int | None = None) -> str:
        scalar = {"float": self.element.type, "integer": f"i{self.element.bits}", "mask": "i1"}[kind]
        width = self.width if width is None else width
        return scalar if width == 1 else f"<{width} x {scalar}>"

    @property
    def has_avx512(self) -> bool:
        return self.machine.vector_bytes == 64

    @property
    def suffix(self) -> str:
        """Of an overloaded intrinsic: v16f32, or f32 for one lane."""
        return self.element.name if self.width == 1 else f"v{self.width}{self.element.name}"

    def append(self, instruction: str) -> str:
        """The name of what `instruction` gives."""
        name = f"%{self.values}"
        self.values += 1
        self.lines.append(f"{name} = {instruction}")
        return name

    def constant(self, kind: str, value: float) -> str:
        scalar = f"i{self.element.bits} {int(value)}" if kind == "integer" else self.element.constant(value)
        return scalar if self.width == 1 else f"{self.type_of(kind)} splat ({scalar})"

    def operand(self, kind: str, value: "Value | float") -> str:
        """`value` with its type, as a call or a select wants it."""
        if isinstance(value, Value):
            assert value.kind == kind, f"a {value.kind} where a {kind} is needed"
            return f"{self.type_of(kind)} {value.name}"
        return self.constant(kind, value)

    def bare(self, kind: str, value: "Value | float") -> str:
        """`value` without its type, as the second operand of an instruction."""
        return self.operand(kind, value).removeprefix(self.type_of(kind) + " ")

    def definition(self, function: str, result: "Value") -> str:
        """The function that returns `result`, after those that it calls."""
        type_ = self.type_of("float")
        lines = [line if line.endswith(":") else f"  {line}" for line in self.lines]
        head = f"define internal {type_} @lf.{function}.{self.suffix}({type_} %x) alwaysinline {self.machine.function_attributes} {{"
        return "\n".join([*self.called, head, "entry:", *lines, f"  ret {type_} {result.name}", "}", ""])


@dataclass(frozen=True, eq=False)
class Value:
    """An SSA value. Comparisons are ordered: false where an operand is NaN."""

    body: Body
    kind: str  # "float", "integer" (as wide as a float) or "mask"
    name: str

    def _binary(self, instruction: str, left: "Value | float", right: "Value | float", gives: str = "") -> "Value":
        body = self.body
        text = f"{instruction} {body.operand(self.kind, left)}, {body.bare(self.kind, right)}"
        return Value(body, gives or self.kind, body.append(text))

    def _arithmetic(self, operation: str, left: "Value | float", right: "Value | float") -> "Value":
        return self._binary("f" + operation if self.kind == "float" else operation, left, right)

    def __add__(self, other: "Value | float") -> "Value":
        return self._arithmetic("add", self, other)

    def __sub__(self, other: "Value | float") -> "Value":
        return self._arithmetic("sub", self, other)

    def __rsub__(self, other: float) -> "Value":
        return self._arithmetic("sub", other, self)

    def __mul__(self, other: "Value | float") -> "Value":
        return self._arithmetic("mul", self, other)

    def __truediv__(self, other: "Value | float") -> "Value":
        return self._binary("fdiv", self, other)

    def __rtruediv__(self, other: float) -> "Value":
        return self._binary("fdiv", other, self)

    def __lshift__(self, count: int) -> "Value":
        return self._binary("shl", self, count)

    def __rshift__(self, count: int) -> "Value":
        return self._binary("lshr", self, count)

    def __xor__(self, other: "Value") -> "Value":
        return self._binary("xor", self, other)

    def __or__(self, other: "Value | int") -> "Value":
        return self._binary("or", self, other)

    def __neg__(self) -> "Value":
        return Value(self.body, self.kind, self.body.append(f"fneg {self.body.operand(self.kind, self)}"))

    def __lt__(self, other: "Value | float") -> "Value":
        return self._binary("fcmp olt", self, other, gives="mask")

    def __gt__(self, other: "Value | float") -> "Value":
        return self._binary("fcmp ogt", self, other, gives="mask")

    def equals(self, other: "Value | float") -> "Value":
        return self._binary("fcmp oeq", self, other, gives="mask")


def _call(body: Body, intrinsic: str, *operands: Value | float) -> Value:
    arguments = ", ".join(body.operand("float", operand) for operand in operands)
    return Value(
        body, "float", body.append(f"call {body.type_of('float')} @llvm.{intrinsic}.{body.suffix}({arguments})")
    )


def fma(a: Value, b: Value | float, c: Value | float) -> Value:
    """a * b + c, rounded once."""
    return _call(a.body, "fma", a, b, c)


def magnitude(x: Value) -> Value:
    return _call(x.body, "fabs", x)


def square_root(x: Value) -> Value:
    return _call(x.body, "sqrt", x)


def with_sign_of(x: Value, sign: Value) -> Value:
    return _call(x.body, "copysign", x, sign)


def where(mask: Value, yes: Value | float, no: Value | float) -> Value:
    body = mask.body
    text = f"select {body.operand('mask', mask)}, {body.operand('float', yes)}, {body.operand('float', no)}"
    return Value(body, "float", body.append(text))


def at_most(x: Value, high: float) -> Value:
    """min(x, high), and NaN stays NaN: one instruction on x86."""
    return where(x > high, high, x)


def at_least(x: Value, low: float) -> Value:
    return where(x < low, low, x)


def bits(x: Value) -> Value:
    return _bitcast(x, "integer")


def from_bits(x: Value) -> Value:
    return _bitcast(x, "float")


def _bitcast(x: Value, kind: str) -> Value:
    body = x.body
    return Value(body, kind, body.append(f"bitcast {body.operand(x.kind, x)} to {body.type_of(kind)}"))


def polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """coefficients[0] + coefficients[1] * x + ..., by Horner's rule: one fma a degree."""
    *lower, highest = coefficients
    total = fma(x, highest, lower.pop())
    for coefficient in reversed(lower):
        total = fma(total, x, coefficient)
    return total


def rarely(mask: Value, function: str, x: Value, otherwise: Value) -> Value:
    """libm's `function` of x in the lanes of `mask`, where there are any; `otherwise` in the rest.

    The one branch: the calls, one a lane, stand in a function of their own, out of the way of the loop around.
    """
    body, type_ = x.body, x.body.type_of("float")
    called = f"@lf.{function}.libm.{body.suffix}"
    body.called.append(
        f"define internal {type_} {called}({type_} %x) noinline cold {body.machine.function_attributes} {{\n"
        f"  %y = call {type_} @llvm.{function}.{body.suffix}({type_} %x)\n  ret {type_} %y\n}}"
    )
    some = mask.name
    if body.width > 1:
        some = body.append(f"call i1 @llvm.vector.reduce.or.v{body.width}i1({body.operand('mask', mask)})")
    body.lines += [f"br i1 {some}, label %rare, label %common", "rare:"]
    rare = where(mask, Value(body, "float", body.append(f"call {type_} {called}({type_} {x.name})")), otherwise)
    body.lines += ["br label %common", "common:"]
    choice = f"phi {type_} [ {otherwise.name}, %entry ], [ {rare.name}, %rare ]"
    return Value(body, "float", body.append(choice))


def avx512(instruction: str, x: Value, *operands: Value | float, immediate: int | None = None) -> Value:
    """An instruction that only AVX-512 has, on as many registers as the width needs (a part of one, below 4 lanes)."""
    body = x.body
    register = min(max(body.width * body.element.bits, 128), 512)
    lanes = register // body.element.bits
    vector = body.type_of("float", lanes)
    precision = {"f32": "ps", "f64": "pd"}[body.element.name]
    tail = [] if immediate is None else [f"i32 {immediate}"]
    tail += [f"{vector} zeroinitializer", f"i{max(lanes, 8)} -1"] + ["i32 4"] * (register == 512)
    columns = [_registers(body, body.operand("float", operand), lanes) for operand in (x, *operands)]
    results = [
        body.append(
            f"call {vector} @llvm.x86.avx512.mask.{instruction}.{precision}.{register}("
            + ", ".join([*(f"{vector} {part}" for part in parts), *tail])
            + ")"
        )
        for parts in zip(*columns, strict=True)
    ]
    return Value(body, "float", _joined(body, results, lanes))


def _registers(body: Body, operand: str, lanes: int) -> list[str]:
    """`operand` cut into registers of so many lanes, or put into the lowest lanes of one."""
    vector = body.type_of("float", lanes)
    if body.width == 1:
        return [body.append(f"insertelement {vector} poison, {operand}, i32 0")]
    if body.width == lanes:
        return [operand.removeprefix(vector + " ")]
    return [
        body.append(f"shufflevector {operand}, {body.type_of('float')} poison, {_order(first, body.width, lanes)}")
        for first in range(0, body.width, lanes)
    ]


def _joined(body: Body, registers: list[str], lanes: int) -> str:
    vector = body.type_of("float", lanes)
    if body.width == 1:
        return body.append(f"extractelement {vector} {registers[0]}, i32 0")
    if body.width < lanes:
        return body.append(f"shufflevector {vector} {registers[0]}, {vector} poison, {_order(0, lanes, body.width)}")
    while len(registers) > 1:
        vector = body.type_of("float", lanes)
        pairs = zip(registers[::2], registers[1::2], strict=True)
        lanes *= 2
        registers = [
            body.append(f"shufflevector {vector} {a}, {vector} {b}, {_order(0, lanes, lanes)}") for a, b in pairs
        ]
    return registers[0]


def _order(first: int, available: int, count: int) -> str:
    """The lanes first, first + 1, ... of a shuffle; poison where there are no more."""
    lanes = (f"i32 {lane}" if lane < available else "i32 poison" for lane in range(first, first + count))
    return f"<{count} x i32> <{', '.join(lanes)}>"
