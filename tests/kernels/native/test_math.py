"""kernels/native/math.py, compiled and run over arrays: errors in ulp, special values, the same bits at every width."""

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

llvm = pytest.importorskip("llvmlite.binding", reason="llvmlite compiles the functions under test")

from llama_fast.kernels.native.machine import AVX2, AVX512, NEON, Machine, host  # noqa: E402
from llama_fast.kernels.native.math import (  # noqa: E402
    FUNCTIONS,
    definition,
    polynomials,
)

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
DTYPES = {"f32": np.float32, "f64": np.float64}
# what each docstring promises
BOUNDS = {"exp": 1, "exp2": 1, "log": 1, "log2": 1, "erf": 1.1, "tanh": 1.5, "rsqrt": 1.5, "sin": 2, "cos": 2}


def machines() -> list[Machine]:
    """Those that this CPU runs."""
    this = host()
    if this is None:
        return []
    same = [m for m in (AVX512, AVX2, NEON) if m.triple.split("-")[0] == this.triple.split("-")[0]]
    return [machine for machine in same if machine.vector_bytes <= this.vector_bytes]


def loop(function: str, element: str, width: int, machine: Machine) -> str:
    """The definition of `function`, and `@run(x, y, count)` that calls it on whole vectors."""
    scalar = {"f32": "float", "f64": "double"}[element]
    type_, suffix = (scalar, element) if width == 1 else (f"<{width} x {scalar}>", f"v{width}{element}")
    return f"""{definition(function, element, width, machine)}
    define void @run(ptr noalias %x, ptr noalias %y, i64 %count) {{
    entry:
      br label %loop
    loop:
      %i = phi i64 [ 0, %entry ], [ %next, %loop ]
      %from = getelementptr {scalar}, ptr %x, i64 %i
      %to = getelementptr {scalar}, ptr %y, i64 %i
      %in = load {type_}, ptr %from, align 4
      %out = call {type_} @lf.{function}.{suffix}({type_} %in)
      store {type_} %out, ptr %to, align 4
      %next = add i64 %i, {width}
      %more = icmp ult i64 %next, %count
      br i1 %more, label %loop, label %done
    done:
      ret void
    }}"""


def optimised(text: str, machine: Machine):
    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.verify()
    target = llvm.Target.from_triple(machine.triple)
    target_machine = target.create_target_machine(cpu=machine.cpu, features=machine.features)
    builder = llvm.create_pass_builder(target_machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(module, builder)
    return module, target_machine


@functools.cache
def compiled(function: str, element: str, width: int, machine: Machine) -> Callable[[np.ndarray], np.ndarray]:
    engine = llvm.create_mcjit_compiler(*optimised(loop(function, element, width, machine), machine))
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(engine.get_function_address("run"))

    def call(x: np.ndarray) -> np.ndarray:
        assert engine is not None and x.dtype == DTYPES[element]
        padded = np.concatenate([x, np.ones(-len(x) % width, x.dtype)])
        y = np.full_like(padded, np.nan)
        run(padded.ctypes.data, y.ctypes.data, len(padded))
        return y[: len(x)]

    return call


def every_exponent(element: str, count: int) -> np.ndarray:
    """Both signs of every exponent, denormals and NaN too, each with `count` mantissas: the ends and random ones."""
    unsigned, mantissa_bits, exponents = {"f32": (np.uint32, 23, 256), "f64": (np.uint64, 52, 2048)}[element]
    mantissas = np.random.default_rng(0).integers(0, 1 << mantissa_bits, (exponents, count), dtype=unsigned)
    mantissas[:, :3] = 0, 1, (1 << mantissa_bits) - 1
    positive = (np.arange(exponents, dtype=unsigned)[:, None] << unsigned(mantissa_bits) | mantissas).ravel()
    sign = unsigned(1 << np.dtype(unsigned).itemsize * 8 - 1)
    return np.concatenate([positive, positive | sign]).view(DTYPES[element])


def where_it_is_hard(function: str, element: str, count: int) -> np.ndarray:
    """Random points of the interval where the result is neither trivial nor, by the formula's symmetry, another's."""
    large = element == "f64"
    low, high = {
        "exp": (-746, 710) if large else (-104, 89),
        "exp2": (-1076, 1025) if large else (-151, 129),
        "log": (0.4, 2.2),
        "log2": (0.4, 2.2),
        "erf": (-6, 6) if large else (-4, 4),
        "tanh": (-20, 20) if large else (-10, 10),
        "rsqrt": (1, 4),
        "sin": (-10, 10),
        "cos": (-10, 10),
    }[function]
    return np.random.default_rng(1).uniform(low, high, count).astype(DTYPES[element])


def angles(element: str, count: int) -> np.ndarray:
    """Whole multiples of pi / 2, where sin or cos is as small as it gets, and random ones, both up to where libm begins."""
    limit = 2.0**30 if element == "f64" else 2.0**17
    rng = np.random.default_rng(2)
    multiples = np.pi / 2 * rng.integers(-int(limit / 1.6), int(limit / 1.6), count)
    return np.concatenate([multiples, rng.uniform(-limit, limit, count)]).astype(DTYPES[element])


def right(function: str, x: np.ndarray) -> np.ndarray:
    """In a wider format: float64 for float32, long double for float64."""
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)
        if function == "rsqrt":
            return 1 / np.sqrt(wide)
        if function == "erf":
            return torch.erf(torch.from_numpy(wide)).numpy() if x.dtype == np.float32 else right_erf(x)
        return getattr(np, function)(wide)


def right_erf(x: np.ndarray) -> np.ndarray:
    with mpmath.workdps(25):
        values = [np.longdouble(mpmath.nstr(mpmath.erf(value), 25)) for value in x.tolist()]
    return np.copysign(values, x)  # mpmath has no -0


def errors(y: np.ndarray, want: np.ndarray) -> np.ndarray:
    """In ulp; infinite where one is infinite, NaN or a zero of the wrong sign and the other is not."""
    with np.errstate(all="ignore"):
        rounded = want.astype(y.dtype)
        ulp = np.abs(y - want) / np.spacing(np.abs(rounded)).astype(want.dtype)
    agree = (y == rounded) | (np.isnan(y) & np.isnan(rounded))
    comparable = np.isfinite(y) & np.isfinite(rounded)
    zeros_differ = (y == 0) & (rounded == 0) & (np.signbit(y) != np.signbit(rounded))
    return np.where(zeros_differ, np.inf, np.where(comparable, ulp, np.where(agree, 0.0, np.inf)))


def assert_same(y: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """The same numbers, and the same signs of zeros; NaN is NaN."""
    np.testing.assert_array_equal(y, want, err_msg=what)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(y[numbers]), np.signbit(want[numbers]), err_msg=what)


def inputs(function: str, element: str, count: int) -> np.ndarray:
    """`count` hard points, and as many spread over all floats."""
    x = [where_it_is_hard(function, element, count), every_exponent(element, max(3, count // 500))]
    return np.concatenate(x + [angles(element, count)] * (function in ("sin", "cos")))


def assert_within_bound(function: str, machine: Machine, x: np.ndarray) -> None:
    element = {np.float32: "f32", np.float64: "f64"}[x.dtype.type]
    y = compiled(function, element, machine.vector_bytes // x.itemsize, machine)(x)
    error = errors(y, right(function, x))
    worst = np.argmax(error)
    assert error[worst] <= BOUNDS[function], f"{function}({x[worst]!r}) = {y[worst]!r}: {error[worst]:.3f} ulp"


@pytest.mark.parametrize("machine", machines(), ids=lambda machine: f"{machine.vector_bytes * 8}-bit")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("element", DTYPES)
def test_error_is_within_the_stated_bound(element, function, machine):
    slow = (function, element) == ("erf", "f64")  # mpmath takes 20 us a value
    assert_within_bound(
        function, machine, inputs(function, element, {"f32": 500_000, "f64": 1_000 if slow else 50_000}[element])
    )


@pytest.mark.nightly
@pytest.mark.parametrize("function", FUNCTIONS)
def test_error_is_within_the_stated_bound_at_one_float32_in_61(function):
    for start in range(0, 1 << 32, 61 << 24):
        floats = np.arange(start, min(start + (61 << 24), 1 << 32), 61, dtype=np.uint32)
        assert_within_bound(function, machines()[0], floats.view(np.float32))


INFINITY, NAN = np.inf, np.nan
SPECIAL = {
    "exp": {-INFINITY: 0.0, INFINITY: INFINITY, 0.0: 1.0, -1e30: 0.0, 1e30: INFINITY},
    "exp2": {-INFINITY: 0.0, INFINITY: INFINITY, 0.0: 1.0, -1e30: 0.0, 1e30: INFINITY, 10.0: 1024.0, -3.0: 0.125},
    "log": {0.0: -INFINITY, -1.0: NAN, -1e-40: NAN, -INFINITY: NAN, INFINITY: INFINITY, 1.0: 0.0},
    "log2": {0.0: -INFINITY, -1.0: NAN, -1e-40: NAN, -INFINITY: NAN, INFINITY: INFINITY, 1.0: 0.0, 2.0**-140: -140.0},
    "erf": {0.0: 0.0, INFINITY: 1.0, -INFINITY: -1.0, 30.0: 1.0, -30.0: -1.0},
    "tanh": {0.0: 0.0, INFINITY: 1.0, -INFINITY: -1.0, 100.0: 1.0, -100.0: -1.0},
    "rsqrt": {0.0: INFINITY, -1.0: NAN, INFINITY: 0.0, -INFINITY: NAN, 4.0: 0.5},
    "sin": {0.0: 0.0, INFINITY: NAN, -INFINITY: NAN},
    "cos": {0.0: 1.0, INFINITY: NAN, -INFINITY: NAN},
}
OF_MINUS_ZERO = {
    "log": -INFINITY,
    "log2": -INFINITY,
    "erf": -0.0,
    "tanh": -0.0,
    "rsqrt": -INFINITY,
    "sin": -0.0,
    "cos": 1.0,
}


@pytest.mark.parametrize("machine", machines(), ids=lambda machine: f"{machine.vector_bytes * 8}-bit")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("element", DTYPES)
def test_special_values_are_exact(element, function, machine):
    cases = [*SPECIAL[function].items(), (NAN, NAN), (-0.0, OF_MINUS_ZERO.get(function, 1.0))]
    x, want = (np.array(column, DTYPES[element]) for column in zip(*cases, strict=True))
    for width in (1, 16):
        assert_same(compiled(function, element, width, machine)(x), want)


@pytest.mark.parametrize("machine", machines(), ids=lambda machine: f"{machine.vector_bytes * 8}-bit")
def test_overflow_and_underflow_begin_where_rounding_says(machine):
    def at(function, element, *x):
        return compiled(function, element, 4, machine)(np.array(x, DTYPES[element])).tolist()

    largest, smallest = 88.72283172607422, -103.97207641601562  # the last float32 whose exp is finite, and is not 0
    beyond = np.nextafter(np.float32(largest), np.float32(100)), np.nextafter(np.float32(smallest), np.float32(-200))
    overflow, underflow = at("exp", "f32", *beyond)
    assert (overflow, underflow) == (INFINITY, 0.0)
    assert np.isfinite(at("exp", "f32", largest)).all() and at("exp", "f32", smallest) == [2.0**-149]
    assert at("exp", "f64", 709.782712893384, 709.7827128933841, -745.1332191019411, -745.1332191019412) == [
        pytest.approx(1.797693134862273e308, rel=1e-12),
        INFINITY,
        2.0**-1074,
        0.0,
    ]
    assert at("exp2", "f32", 127.99999, 128.0, -149.0, -150.0)[1:] == [INFINITY, 2.0**-149, 0.0]
    assert at("exp2", "f64", 1023.0, 1024.0, -1074.0, -1075.0) == [2.0**1023, INFINITY, 2.0**-1074, 0.0]


@pytest.mark.parametrize("element", DTYPES)
def test_powers_of_two_are_exact_and_nothing_exceeds_one(element):
    machine = machines()[0]
    exponents = np.arange(-149, 128) if element == "f32" else np.arange(-1074, 1024)
    powers = np.ldexp(np.ones((), DTYPES[element]), exponents)
    np.testing.assert_array_equal(compiled("exp2", element, 8, machine)(exponents.astype(DTYPES[element])), powers)
    np.testing.assert_array_equal(compiled("log2", element, 8, machine)(powers), exponents)
    for function in ("sin", "cos", "tanh", "erf"):
        x = np.concatenate([where_it_is_hard(function, element, 100_000), angles(element, 10_000)])
        assert np.abs(compiled(function, element, 8, machine)(x)).max() <= 1, function


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("element", DTYPES)
def test_a_lane_has_the_same_bits_at_every_width_and_on_every_cpu(element, function):
    """Lanes beyond sin's and cos's limit stand beside lanes within it."""
    x = np.concatenate([where_it_is_hard(function, element, 3_000), every_exponent(element, 3)])
    x = np.random.default_rng(3).permutation(x)
    x = x[~np.isnan(x)]
    results = {
        (machine.cpu, width): compiled(function, element, width, machine)(x)
        for machine in machines()
        for width in (WIDTHS if element == "f32" else WIDTHS[:5])
    }
    first = next(iter(results.values()))
    for where, result in results.items():
        assert_same(result, first, f"{function} {where}")


@pytest.mark.parametrize("machine", [AVX512, AVX2, NEON], ids=["AVX512", "AVX2", "NEON"])
def test_one_module_holds_all_functions_and_compiles_for_every_cpu(machine):
    """For CPUs that are not here too; but for libm's sin and cos nothing is called."""
    widths = (1, machine.vector_bytes // 4)
    text = "\n".join(definition(f, e, width, machine) for f in FUNCTIONS for e in DTYPES for width in widths)
    callers = "\n".join(
        f"define {scalar} @call_{function}_{element}({scalar} %x) {{\n"
        f"  %y = call {scalar} @lf.{function}.{element}({scalar} %x)\n  ret {scalar} %y\n}}"
        for function in FUNCTIONS
        for element, scalar in (("f32", "float"), ("f64", "double"))
    )
    module, target_machine = optimised(text + callers, machine)
    libm = re.findall(r"\b(?:sin|cos|tanh|exp|exp2|log|log2|erf|fma|sqrt)f?\b", target_machine.emit_assembly(module))
    assert set(libm) == {"sin", "sinf", "cos", "cosf"}


@pytest.mark.parametrize(
    ("function", "machine", "most"), [("exp", AVX512, 12), ("exp", AVX2, 18), ("exp2", AVX512, 9), ("exp2", AVX2, 17)]
)
def test_exponentials_are_as_short_as_their_docstrings_say(function, machine, most):
    module, target_machine = optimised(loop(function, "f32", machine.vector_bytes // 4, machine), machine)
    body = target_machine.emit_assembly(module).split("run:")[1]
    instructions = [line.split()[0] for line in body.splitlines() if line.startswith("\tv")]
    moves = ("vmov", "vbroadcast", "vzeroupper", "vpbroadcast")
    assert len([name for name in instructions if not name.startswith(moves)]) == most, instructions


def test_polynomials_are_those_that_the_fit_finds():
    script = Path(__file__).with_name("fit_polynomials.py")
    spec = importlib.util.spec_from_file_location("fit_polynomials", script)
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    assert fit.table() == Path(polynomials.__file__).read_text()
