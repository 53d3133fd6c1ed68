"""What each op of arithmetic becomes: a table from its name to a short function that writes one or a few instructions.

    arith.addf  -> fadd                      arith.select -> select
    math.exp    -> call @lf.exp.v16f32       arith.truncf -> fptrunc

A function takes the operands as LLVM values of `width` lanes and returns the result's name. `elementwise` decides before
that whether a vector is needed at all: integers that are affine in the lane stay so (`lanes.py`), uniform operands are
computed once, numbers known at compile time are folded. No fast-math flags anywhere: what is written is what is computed.
"""

from collections.abc import Callable

from .. import math
from ..ttir import Op
from .affine import affine, conjunction, fold
from .builder import Builder
from .elements import (
    BITS,
    Operand,
    from_bits,
    is_float,
    is_pointer,
    literal,
    splat_literal,
    suffix,
    vector_type,
)  # fmt: skip
from .lanes import Lane, Uniform, Use, Vector, as_vector

Instruction = Callable[[Builder, Op, list[str], int], str]


def elementwise(b: Builder, op: Op, operands: list[Lane], width: int, use: Use = Use.VALUE) -> Lane:
    """The lane value of an op of arithmetic."""
    if op.kind not in INSTRUCTIONS:
        raise NotImplementedError(op.kind)
    lane = affine(b, op, operands, use) or conjunction(b, op, operands)
    if lane is not None:
        return lane
    if all(isinstance(operand, Uniform) for operand in operands):
        numbers = [operand.x for operand in operands if isinstance(operand, Uniform)]
        folded = fold(op, numbers)
        if folded is not None:
            return Uniform(folded)
        texts = [literal(x, value.element) for x, value in zip(numbers, op.operands, strict=True)]
        return Uniform(INSTRUCTIONS[op.kind](b, op, texts, 1))
    vectors = [as_vector(b, lane, value.element, width) for lane, value in zip(operands, op.operands, strict=True)]
    return Vector(INSTRUCTIONS[op.kind](b, op, vectors, width))


def constant(op: Op) -> Operand:
    """The number of an `arith.constant` (all elements of a tensor are the same)."""
    text, element = op.attributes["value"], op.result.element
    if text in ("true", "false"):
        return text == "true"
    if is_float(element):
        return from_bits(int(text, 16), element) if text.startswith("0x") else float(text)
    return int(text, 0)


# -- instructions


def _kind(op: Op, width: int) -> str:
    return vector_type(op.result.element, width)


def _operand_kind(op: Op, width: int) -> str:
    return vector_type(op.operands[0].element, width)


def _binary(instruction: str) -> Instruction:
    return lambda b, op, x, width: b.let(f"{instruction} {_kind(op, width)} {x[0]}, {x[1]}")


def _cast(instruction: str) -> Instruction:
    return lambda b, op, x, width: b.let(f"{instruction} {_operand_kind(op, width)} {x[0]} to {_kind(op, width)}")


def _intrinsic(name: str) -> Instruction:
    def write(b: Builder, op: Op, x: list[str], width: int) -> str:
        kind = _kind(op, width)
        return b.call(kind, f"llvm.{name}.{suffix(op.result.element, width)}", *((kind, operand) for operand in x))

    return _in_float32(write)


def _in_float32(write: Instruction) -> Instruction:
    """16-bit floats are computed in float32 and rounded once."""

    def rounded(b: Builder, op: Op, x: list[str], width: int) -> str:
        element = op.result.element
        if element not in ("f16", "bf16"):
            return write(b, op, x, width)
        wide = Op(op.kind, [], [type(op.result)("", (), "f32")], op.attributes)
        return convert_float(
            b, write(b, wide, [convert_float(b, y, element, "f32", width) for y in x], width), "f32", element, width
        )

    return rounded


def _float(instruction: str) -> Instruction:
    return _in_float32(_binary(instruction))


def _function(name: str) -> Instruction:
    def write(b: Builder, op: Op, x: list[str], width: int) -> str:
        return call_math(b, name, x[0], op.result.element, width)

    return _in_float32(write)


def call_math(b: Builder, name: str, x: str, element: str, width: int) -> str:
    """A function of `math/`."""
    symbol = f"lf.{name}.{suffix(element, width)}"
    if symbol not in b.definitions:
        b.definitions[symbol] = math.definition(name, element, width, b.machine)
    kind = vector_type(element, width)
    return b.let(f"call {kind} @{symbol}({kind} {x})")


def convert_float(b: Builder, x: str, source: str, target: str, width: int) -> str:
    """Between float types, rounded to nearest even."""
    if source == target:
        return x
    if source == "bf16":
        return convert_float(b, _from_bf16(b, x, width), "f32", target, width)
    if source == "f64" and target in ("f16", "bf16"):
        return convert_float(b, _to_odd_f32(b, x, width), "f32", target, width)
    if target == "bf16":
        return _to_bf16(b, convert_float(b, x, source, "f32", width), width)
    cast = "fpext" if BITS[target] > BITS[source] else "fptrunc"
    return b.let(f"{cast} {vector_type(source, width)} {x} to {vector_type(target, width)}")


def _to_odd_f32(b: Builder, x: str, width: int) -> str:
    """A float64 cut to float32, with the last bit set where digits were lost: rounded again to 16 bits it is as if rounded once.

    LLVM would call libgcc for float16 instead, which a process need not have. Boldo and Melquiond, Emulation of FMA and Correctly
    Rounded Sums, 2008.
    """
    ints, longs, floats, doubles = (vector_type(element, width) for element in ("i32", "i64", "f32", "f64"))
    flags, no_sign = vector_type("i1", width), splat_literal(2**63 - 1, "i64", width)
    nearest = b.let(f"fptrunc {doubles} {x} to {floats}")
    back = b.let(f"fpext {floats} {nearest} to {doubles}")
    size, rounded = (b.let(f"and {longs} {b.let(f'bitcast {doubles} {y} to {longs}')}, {no_sign}") for y in (x, back))
    too_large = b.let(f"zext {flags} {b.let(f'icmp ugt {longs} {rounded}, {size}')} to {ints}")
    inexact = b.let(f"zext {flags} {b.let(f'icmp ne {longs} {rounded}, {size}')} to {ints}")
    cut = b.let(f"sub {ints} {b.let(f'bitcast {floats} {nearest} to {ints}')}, {too_large}")
    return b.let(f"bitcast {ints} {b.let(f'or {ints} {cut}, {inexact}')} to {floats}")


def _from_bf16(b: Builder, x: str, width: int) -> str:
    """The upper half of a float32."""
    shorts, ints, floats = (vector_type(element, width) for element in ("i16", "i32", "f32"))
    high = b.let(f"shl {ints} {b.let(f'zext {shorts} {x} to {ints}')}, {splat_literal(16, 'i32', width)}")
    return b.let(f"bitcast {ints} {high} to {floats}")


def _to_bf16(b: Builder, x: str, width: int) -> str:
    ints, shorts, floats = (vector_type(element, width) for element in ("i32", "i16", "f32"))
    if b.machine.has_bf16_products:  # then it has the conversion too
        native = floats.replace("float", "bfloat")
        return b.let(f"bitcast {native} {b.let(f'fptrunc {floats} {x} to {native}')} to {shorts}")
    # else by integers: add half a unit in the last place, cut; NaN keeps a bit
    number = lambda n: splat_literal(n, "i32", width)  # noqa: E731
    bits = b.let(f"bitcast {floats} {x} to {ints}")
    odd = b.let(f"and {ints} {b.let(f'lshr {ints} {bits}, {number(16)}')}, {number(1)}")
    rounded = b.let(f"add {ints} {b.let(f'add {ints} {bits}, {number(0x7FFF)}')}, {odd}")
    is_nan = b.let(f"fcmp uno {floats} {x}, {x}")
    quiet = b.let(f"or {ints} {bits}, {number(0x400000)}")
    chosen = b.let(f"select {vector_type('i1', width)} {is_nan}, {ints} {quiet}, {ints} {rounded}")
    return b.let(f"trunc {ints} {b.let(f'lshr {ints} {chosen}, {number(16)}')} to {shorts}")


def _convert(b: Builder, op: Op, x: list[str], width: int) -> str:
    return convert_float(b, x[0], op.operands[0].element, op.result.element, width)


def _division(instruction: str) -> Instruction:
    """Divisions that would end the process divide by one: by zero, which lanes that a mask leaves out may ask for, and of the
    least number by -1, whose quotient it is itself."""

    def write(b: Builder, op: Op, x: list[str], width: int) -> str:
        kind, flags, element = _kind(op, width), vector_type("i1", width), op.result.element
        number = lambda n: splat_literal(n, element, width)  # noqa: E731
        unsafe = b.let(f"icmp eq {kind} {x[1]}, {number(0)}")
        if instruction.startswith("s"):
            least = b.let(f"icmp eq {kind} {x[0]}, {number(-(1 << (BITS[element] - 1)))}")
            overflows = b.let(f"and {flags} {least}, {b.let(f'icmp eq {kind} {x[1]}, {number(-1)}')}")
            unsafe = b.let(f"or {flags} {unsafe}, {overflows}")
        divisor = b.let(f"select {flags} {unsafe}, {kind} {number(1)}, {kind} {x[1]}")
        return b.let(f"{instruction} {kind} {x[0]}, {divisor}")

    return write


def _compare_with(instruction: str) -> Instruction:
    def write(b: Builder, op: Op, x: list[str], width: int) -> str:
        element = op.operands[0].element
        if element == "bf16":
            x, element = [convert_float(b, y, "bf16", "f32", width) for y in x], "f32"
        return b.let(f"{instruction} {op.attributes['words'][0]} {vector_type(element, width)} {x[0]}, {x[1]}")

    return write


def _from_integer(instruction: str) -> Instruction:
    def write(b: Builder, op: Op, x: list[str], width: int) -> str:
        element = op.result.element
        wide = "f32" if element in ("f16", "bf16") else element
        y = b.let(f"{instruction} {_operand_kind(op, width)} {x[0]} to {vector_type(wide, width)}")
        return convert_float(b, y, wide, element, width)

    return write


def _to_integer(instruction: str) -> Instruction:
    def write(b: Builder, op: Op, x: list[str], width: int) -> str:
        element = op.operands[0].element
        wide = "f32" if element in ("f16", "bf16") else element
        y = convert_float(b, x[0], element, wide, width)
        # beyond the integers' range the result saturates, where LLVM's plain conversion is undefined
        source, target = suffix(wide, width), suffix(op.result.element, width)
        return b.call(_kind(op, width), f"llvm.{instruction}.sat.{target}.{source}", (vector_type(wide, width), y))

    return write


def _select(b: Builder, op: Op, x: list[str], width: int) -> str:
    kind = _kind(op, width)
    return b.let(f"select {vector_type('i1', width)} {x[0]}, {kind} {x[1]}, {kind} {x[2]}")


def _negate(b: Builder, op: Op, x: list[str], width: int) -> str:
    return b.let(f"fneg {_kind(op, width)} {x[0]}")


def _rsqrt(b: Builder, op: Op, x: list[str], width: int) -> str:
    kind, element = _kind(op, width), op.result.element
    root = b.call(kind, f"llvm.sqrt.{suffix(element, width)}", (kind, x[0]))
    return b.let(f"fdiv {kind} {splat_literal(1.0, element, width)}, {root}")


def _high_product(extend: str) -> Instruction:
    """The upper half of an integer product."""

    def write(b: Builder, op: Op, x: list[str], width: int) -> str:
        kind, element = _kind(op, width), op.result.element
        bits = BITS[element]
        wide = f"i{2 * bits}" if width == 1 else f"<{width} x i{2 * bits}>"
        left, right = (b.let(f"{extend} {kind} {y} to {wide}") for y in x)
        shift = str(bits) if width == 1 else "<" + ", ".join([f"i{2 * bits} {bits}"] * width) + ">"
        high = b.let(f"lshr {wide} {b.let(f'mul {wide} {left}, {right}')}, {shift}")
        return b.let(f"trunc {wide} {high} to {kind}")

    return write


def _clamp(b: Builder, op: Op, x: list[str], width: int) -> str:
    lower, upper = ("maximum", "minimum") if op.attributes.get("propagateNan") == "all" else ("maxnum", "minnum")
    return _intrinsic(upper)(b, op, [_intrinsic(lower)(b, op, x[:2], width), x[2]], width)


def _bitcast(b: Builder, op: Op, x: list[str], width: int) -> str:
    source, target = _operand_kind(op, width), _kind(op, width)
    if is_pointer(op.result.element) and is_pointer(op.operands[0].element):
        return x[0]
    return x[0] if source == target else b.let(f"bitcast {source} {x[0]} to {target}")


def _absolute(b: Builder, op: Op, x: list[str], width: int) -> str:
    kind = _kind(op, width)
    return b.call(kind, f"llvm.abs.{suffix(op.result.element, width)}", (kind, x[0]), ("i1", "false"))


_LIBDEVICE = {
    "exp": "exp",
    "exp2": "exp2",
    "log": "log",
    "log2": "log2",
    "erf": "erf",
    "tanh": "tanh",
    "rsqrt": "rsqrt",
    "sin": "sin",
    "cos": "cos",
}
_LIBDEVICE_INTRINSICS = {"fabs": "fabs", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "rint", "sqrt": "sqrt", "fma": "fma",
                         "fmin": "minnum", "fmax": "maxnum", "copysign": "copysign", "pow": "pow", "round": "round", "nearbyint": "nearbyint",
                         "log10": "log10", "exp10": "exp10", "tan": "tan", "fast_exp": "exp", "atan": "atan", "asin": "asin", "acos": "acos", "sinh": "sinh", "cosh": "cosh"}  # fmt: skip

_C_LIBRARY = {"acosh", "asinh", "atan2", "atanh", "cbrt", "erfc", "expm1", "fmod", "hypot", "j0", "j1", "lgamma", "log1p", "remainder", "tgamma",
              "y0", "y1"}  # fmt: skip


def _libdevice(b: Builder, op: Op, x: list[str], width: int) -> str:
    """`tl.extra.libdevice`: NVIDIA's names, with ours behind them, or the C library's, a lane at a time."""
    symbol = str(op.attributes["symbol"]).removeprefix("__nv_")
    name = symbol.removesuffix("f") if op.result.element == "f32" else symbol
    if name in _LIBDEVICE:
        return (
            _rsqrt(b, op, x, width)
            if name == "rsqrt"
            else call_math(b, _LIBDEVICE[name], x[0], op.result.element, width)
        )
    if name in _LIBDEVICE_INTRINSICS:
        return _intrinsic(_LIBDEVICE_INTRINSICS[name])(b, op, x, width)
    if name in _C_LIBRARY:
        return _c_library(b, op, x, width, name + ("f" if op.result.element == "f32" else ""))
    raise NotImplementedError(f"libdevice's {symbol}")


def _c_library(b: Builder, op: Op, x: list[str], width: int, function: str) -> str:
    """A function of the C library, a lane at a time."""
    scalar, kind = _kind(op, 1), _kind(op, width)
    if width == 1:
        return b.call(scalar, function, *((scalar, operand) for operand in x))
    result = "poison"
    for lane in range(width):
        operands = [b.let(f"extractelement {kind} {operand}, i64 {lane}") for operand in x]
        y = b.call(scalar, function, *((scalar, operand) for operand in operands))
        result = b.let(f"insertelement {kind} {result}, {scalar} {y}, i64 {lane}")
    return result


INSTRUCTIONS: dict[str, Instruction] = {
    "arith.addf": _float("fadd"),
    "arith.subf": _float("fsub"),
    "arith.mulf": _float("fmul"),
    "arith.divf": _float("fdiv"),
    "arith.remf": _float("frem"),
    "arith.negf": _in_float32(_negate),
    "arith.maxnumf": _intrinsic("maxnum"),
    "arith.minnumf": _intrinsic("minnum"),
    "arith.maximumf": _intrinsic("maximum"),
    "arith.minimumf": _intrinsic("minimum"),
    "arith.addi": _binary("add"),
    "arith.subi": _binary("sub"),
    "arith.muli": _binary("mul"),
    "arith.divsi": _division("sdiv"),
    "arith.divui": _division("udiv"),
    "arith.remsi": _division("srem"),
    "arith.remui": _division("urem"),
    "arith.andi": _binary("and"),
    "arith.ori": _binary("or"),
    "arith.xori": _binary("xor"),
    "arith.shli": _binary("shl"),
    "arith.shrsi": _binary("ashr"),
    "arith.shrui": _binary("lshr"),
    "arith.minsi": _intrinsic("smin"),
    "arith.maxsi": _intrinsic("smax"),
    "arith.minui": _intrinsic("umin"),
    "arith.maxui": _intrinsic("umax"),
    "arith.cmpi": _compare_with("icmp"),
    "arith.cmpf": _compare_with("fcmp"),
    "arith.select": _select,
    "arith.extf": _convert,
    "arith.truncf": _convert,
    "tt.fp_to_fp": _convert,
    "arith.extsi": _cast("sext"),
    "arith.extui": _cast("zext"),
    "arith.trunci": _cast("trunc"),
    "arith.sitofp": _from_integer("sitofp"),
    "arith.uitofp": _from_integer("uitofp"),
    "arith.fptosi": _to_integer("fptosi"),
    "arith.fptoui": _to_integer("fptoui"),
    "arith.bitcast": _bitcast,
    "tt.bitcast": _bitcast,
    "tt.ptr_to_int": _cast("ptrtoint"),
    "tt.int_to_ptr": _cast("inttoptr"),
    "tt.mulhiui": _high_product("zext"),
    "tt.mulhisi": _high_product("sext"),
    "tt.clampf": _clamp,
    "tt.precise_sqrt": _intrinsic("sqrt"),
    "tt.precise_divf": _float("fdiv"),
    "tt.extern_elementwise": _libdevice,
    "math.sqrt": _intrinsic("sqrt"),
    "math.rsqrt": _rsqrt,
    "math.absf": _intrinsic("fabs"),
    "math.absi": _absolute,
    "math.floor": _intrinsic("floor"),
    "math.ceil": _intrinsic("ceil"),
    "math.trunc": _intrinsic("trunc"),
    "math.round": _intrinsic("round"),
    "math.fma": _intrinsic("fma"),
    "math.exp": _function("exp"),
    "math.exp2": _function("exp2"),
    "math.log": _function("log"),
    "math.log2": _function("log2"),
    "math.erf": _function("erf"),
    "math.tanh": _function("tanh"),
    "math.sin": _function("sin"),
    "math.cos": _function("cos"),
}
"""Kinds of ops, with what they become. `tests/kernels/native` hold that no kernel of this package needs another."""
