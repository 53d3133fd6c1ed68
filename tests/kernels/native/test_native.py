"""llama_fast.native: how kernels are launched, what they print, and what fails in which words."""

import re

import pytest
import torch

import llama_fast
from llama_fast import native
from llama_fast.kernels.native import compiled
from llama_fast.kernels.triton_compat import tl, triton

pytest.importorskip("triton", reason="kernels are Triton's")
pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}"
)


@triton.jit
def scale_kernel(x, out, n, factor, bias, BLOCK: tl.constexpr, FLIP: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, i < n) * factor
    if bias is not None:
        y += tl.load(bias + i, i < n)
    tl.store(out + i, -y if FLIP else y, i < n)


def test_arguments_by_place_and_by_name():
    x, bias, out = torch.rand(100), torch.rand(100), torch.empty(100)
    native.launch(scale_kernel, (2,), x, out, 100, 2.0, None, 64)
    assert torch.equal(out, x * 2)
    native.launch(
        scale_kernel, (2,), x, bias=bias, out=out, n=100, factor=3, FLIP=True, BLOCK=64, num_warps=8, num_stages=2
    )
    assert torch.equal(out, -(x * 3 + bias))
    llama_fast.native.launch(
        scale_kernel, lambda given: (triton.cdiv(given["n"], given["BLOCK"]),), x, out, 99, 1, None, BLOCK=32
    )
    assert torch.equal(out[:99], x[:99])


def test_constants_that_are_equal_and_not_the_same():
    x, out = torch.rand(4), torch.empty(4)
    for flip, sign in ((True, -1), (False, 1)):
        native.launch(scale_kernel, (1,), x, out, 4, True, None, BLOCK=4, FLIP=flip)
        assert torch.equal(out, sign * x)


@triton.jit
def type_kernel(x, out, C: tl.constexpr):
    tl.store(out, tl.load(x) * C)


def test_a_constant_is_told_from_an_equal_one_of_another_type():
    x, out = torch.tensor([2**24 + 1], dtype=torch.int32), torch.empty(1, dtype=torch.float64)
    for constant, expected in ((1, 2**24 + 1), (1.0, 2**24), (True, 2**24 + 1)):
        native.launch(type_kernel, (1,), x, out, constant)
        assert out.item() == expected


@triton.jit
def constant_kernel(out, C: tl.constexpr):
    tl.store(out, C)


def test_nan_is_one_constant():
    out = torch.zeros(1)
    with compiled.recording() as launches:
        for _ in range(2):
            native.launch(constant_kernel, (1,), out, float("nan"))
    assert out.isnan() and launches[0][0] is launches[1][0]


FACTOR = tl.constexpr(2)


@triton.jit
def global_kernel(out, C: tl.constexpr):
    tl.store(out, FACTOR + C)


def test_a_global_that_has_changed_is_an_error(monkeypatch):
    out = torch.zeros(1)
    native.launch(global_kernel, (1,), out, 0)
    assert out.item() == 2
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "FACTOR", tl.constexpr(3))
        for constant in (0, 1):
            with pytest.raises(RuntimeError, match=r"global_kernel: the global FACTOR was .*2.* and is .*3"):
                native.launch(global_kernel, (1,), out, constant)
    native.launch(global_kernel, (1,), out, 1)  # and nothing was kept that was compiled with 3
    assert out.item() == 3


def test_a_number_beyond_float32_is_infinite():
    out = torch.zeros(2)
    native.launch(scale_kernel, (1,), torch.tensor([1.0, -1.0]), out, 2, 1e300, None, BLOCK=2)
    assert out.tolist() == [torch.inf, -torch.inf]


@triton.jit
def wide_kernel(out, n):
    tl.store(out, n // 3)


@pytest.mark.parametrize("n", [1, -7, 2**31, -(2**40), 2**63, 2**64 - 2])
def test_integers_of_any_size(n):
    out = torch.empty(1, dtype=torch.int64 if n < 2**63 else torch.uint64)
    native.launch(wide_kernel, (1,), out, n)
    assert out.item() == (n // 3 if n > 0 else -(-n // 3))


@pytest.mark.parametrize(
    ("error", "words", "arguments", "named"),
    [
        (TypeError, "scale_kernel: missing a required argument: 'bias'", (torch.ones(4), torch.ones(4), 4, 2.0), dict(BLOCK=4)),
        (TypeError, "scale_kernel: there is no argument 'BLOK', only x, out, n, factor, bias, BLOCK, FLIP", (torch.ones(4), torch.ones(4), 4, 2.0, None), dict(BLOK=4)),
        (TypeError, "scale_kernel: x is negated when it is read: pass x.resolve_neg()", (torch._neg_view(torch.ones(4)), torch.ones(4), 4, 2.0, None), dict(BLOCK=4)),
        (ValueError, "scale_kernel: x must be on the CPU, and is on meta", (torch.ones(4, device="meta"), torch.ones(4), 4, 2.0, None), dict(BLOCK=4)),
        (TypeError, "scale_kernel: x is of torch.complex64, which is not compiled", (torch.ones(4) * 1j, torch.ones(4), 4, 2.0, None), dict(BLOCK=4)),
        (TypeError, "scale_kernel: x is of torch.float8_e5m2, which", (torch.ones(4).to(torch.float8_e5m2), torch.ones(4), 4, 2.0, None), dict(BLOCK=4)),
        (TypeError, "scale_kernel: x must be a dense tensor", (torch.ones(4).to_sparse(), torch.ones(4), 4, 2.0, None), dict(BLOCK=4)),
        (TypeError, "scale_kernel: factor must be a tensor, a number or None, and is of type str", (torch.ones(4), torch.ones(4), 4, "2", None), dict(BLOCK=4)),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(error, words, arguments, named):
    with pytest.raises(error, match=re.escape(words)):
        native.launch(scale_kernel, (1,), *arguments, **named)


@pytest.mark.parametrize("grid", [8, "8", (), (1, 2, 3, 4), (1.5,), lambda given: 8])
def test_a_grid_that_is_none(grid):
    with pytest.raises(TypeError, match="scale_kernel: grid must be one to three ints"):
        native.launch(scale_kernel, grid, torch.ones(4), torch.ones(4), 4, 2.0, None, BLOCK=4)
    with pytest.raises(TypeError, match=r"kernel must be a function under @triton\.jit, got function"):
        native.launch(lambda x: x, (1,), torch.ones(4))


@pytest.mark.parametrize("size", [-1, 2**31])
def test_a_grid_of_no_size(size):
    with pytest.raises(ValueError, match="scale_kernel: grid must be of numbers from 0 to"):
        native.launch(scale_kernel, (1, size), torch.ones(4), torch.ones(4), 4, 2.0, None, BLOCK=4)


def test_an_empty_grid_launches_nothing():
    out = torch.zeros(4)
    native.launch(scale_kernel, (0, 3), torch.ones(4), out, 4, 2.0, None, BLOCK=4)
    assert not out.any()


# -- autotune, heuristics

tuned = []


@triton.autotune(
    [triton.Config({"BLOCK": 16}, num_warps=1), triton.Config({"BLOCK": 64}, pre_hook=lambda given: tuned.append(given["BLOCK"]))],
    key=["n"], restore_value=["x"],
)  # fmt: skip
@triton.heuristics({"EVEN": lambda given: given["n"] % given["BLOCK"] == 0})
@triton.jit
def doubled_in_place(x, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(x + i, tl.load(x + i) * 2)
    else:
        tl.store(x + i, tl.load(x + i, i < n) * 2, i < n)


def test_autotune_and_heuristics():
    for n in (128, 100, 128):
        x = torch.rand(n)
        expected = x * 2
        native.launch(doubled_in_place, lambda given: (triton.cdiv(given["n"], given["BLOCK"]),), x, n)
        assert torch.equal(x, expected)
    assert set(tuned) == {64}
    assert not doubled_in_place.cache  # the user's own, for a GPU


# -- what kernels print and assert


@triton.jit
def print_kernel(x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.device_print("both", i, tl.load(x + i))
    tl.device_print("hex", i.to(tl.uint8) + 9, hex=True)
    tl.device_print("alone")


def test_device_print(capfd):
    native.launch(print_kernel, (1, 2), torch.tensor([0.5, -1.0]), N=2)
    lines = capfd.readouterr().out.splitlines()
    for pid in range(2):
        head = f"pid (0, {pid}, 0)"
        wanted = [
            f"{head} idx (0) both: (operand 0) 0",
            f"{head} idx (1) both: (operand 1) -1.000000",
            f"{head} idx (1) hex: 0x0a",
            f"{head} alone",
        ]
        assert all(any(line.strip() == one.strip() for line in lines) for one in wanted), lines
    assert len(lines) == 2 * (4 + 2 + 1)


@triton.jit
def assert_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, i < n, 1.0)
    tl.device_assert(y > 0, 'all "positive"', mask=i < n)
    tl.store(out + i, y.to(tl.float32), i < n)


def test_device_assert():
    x, out = torch.ones(100), torch.zeros(100)
    native.launch(assert_kernel, (4,), x, out, 100, BLOCK=32, debug=True)
    assert torch.equal(out, x)
    x[70], out = -1, torch.zeros(100)
    place = r'assert_kernel, \S*test_native\.py:\d+: all "positive" \(program \(2, 0, 0\)\)'
    with pytest.raises(AssertionError, match=place):
        native.launch(assert_kernel, (4,), x, out, 100, BLOCK=32, debug=True)
    assert out[:64].all() and not out[64:96].any()  # the program ended there
    native.launch(assert_kernel, (4,), x, out, 100, BLOCK=32)  # Triton drops asserts
    assert torch.equal(out, x)


@triton.jit(debug=True)
def debug_kernel(x):
    tl.device_assert(tl.load(x) > 0)


def test_asserts_are_kept_where_triton_keeps_them(monkeypatch):
    with pytest.raises(AssertionError, match="debug_kernel"):
        native.launch(debug_kernel, (1,), torch.zeros(1))
    x, out = -torch.ones(32), torch.zeros(32)
    native.launch(assert_kernel, (1,), x, out, 32, BLOCK=32)
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    with pytest.raises(AssertionError, match="assert_kernel"):
        native.launch(assert_kernel, (1,), x, out, 32, BLOCK=32)


@triton.jit
def texts_kernel(x):
    tl.device_print("a {b} loc(1), c = <d> -> e : %f", tl.load(x))
    tl.device_assert(tl.load(x) > 5, 'a {b} loc(1), "c" = <d> -> e : %f')


def test_texts_are_what_they_are(capfd):
    with pytest.raises(AssertionError, match=re.escape(': a {b} loc(1), "c" = <d> -> e : %f (program')):
        native.launch(texts_kernel, (1,), torch.ones(1), debug=True)
    assert capfd.readouterr().out.strip() == "pid (0, 0, 0) idx () a {b} loc(1), c = <d> -> e : %f: 1.000000"


# -- bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bool])
def test_bounds_of_loads_and_stores(dtype):
    x, bias, out = torch.ones(128).to(dtype), torch.ones(128).to(dtype), torch.zeros(128).to(dtype)
    factor = 1 if dtype == torch.bool else 2
    native.launch(scale_kernel, (2,), x, out, 128, factor, bias, BLOCK=64, check_bounds=True)
    expected = out.clone()
    out.zero_()
    words = r"scale_kernel, \S*test_native\.py:\d+: element {} is outside the memory of {}, which has {} elements \(program \(1, 0, 0\)\)"
    with pytest.raises(IndexError, match=words.format(100, "x", 100)):
        native.launch(scale_kernel, (2,), x[:100], out, 128, factor, bias, BLOCK=64, check_bounds=True)
    with pytest.raises(IndexError, match=words.format(101, "bias", 101)):
        native.launch(scale_kernel, (2,), x, out, 128, factor, bias[:101], BLOCK=64, check_bounds=True)
    out.zero_()
    with pytest.raises(IndexError, match=words.format(99, "out", 99)):
        native.launch(scale_kernel, (2,), x, out[:99], 128, factor, bias, BLOCK=64, check_bounds=True)
    assert torch.equal(out[:99], expected[:99]) and not out[99:].any()


@triton.jit
def scatter_kernel(x, y, index, n, N: tl.constexpr):
    i = tl.arange(0, N)
    p = x
    for _ in range(n):
        tl.atomic_add(p + tl.load(index + i), 1.0)
        p, x = y, p
    tl.store(y + tl.load(index), tl.load(x + tl.load(index + 1)))
    tl.atomic_cas(y + tl.load(index + 1).to(tl.int32), 5.0, 6.0)


@pytest.mark.parametrize("position", [3, 0, 1])
@pytest.mark.parametrize("bad", [8, -1])
def test_bounds_of_gathers_scalars_and_atomics(position, bad):
    x, y, index = torch.zeros(8), torch.zeros(8), torch.arange(4)
    native.launch(scatter_kernel, (1,), x, y, index, 2, N=4, check_bounds=True)
    index[position] = bad
    with pytest.raises(IndexError, match=f"element {bad} is outside the memory of [xy], which has 8 elements"):
        native.launch(scatter_kernel, (1,), x, torch.zeros(8), index, 2, N=4, check_bounds=True)


def test_bounds_asked_for_by_the_environment(monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_CHECK_BOUNDS", "1")
    with pytest.raises(IndexError, match="element 3 is outside the memory of out"):
        native.launch(scale_kernel, (1,), torch.ones(4), torch.ones(3), 4, 2.0, None, BLOCK=4)
    monkeypatch.setenv("LLAMA_FAST_CHECK_BOUNDS", "yes")
    with pytest.raises(ValueError, match="LLAMA_FAST_CHECK_BOUNDS must be 0 or 1, got 'yes'"):
        native.launch(scale_kernel, (1,), torch.ones(4), torch.ones(4), 4, 2.0, None, BLOCK=4)


# -- what is not compiled


@triton.jit
def scaled_product_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    s = tl.zeros((N, N // 32), tl.uint8) + 127
    tl.store(out + i, tl.dot_scaled(tl.load(a + i), s, "bf16", tl.load(b + i), None, "bf16"))


@triton.jit
def assembly_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tl.load(x + i)], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + i, y)


@triton.jit
def _by_assembly(a, b):
    return tl.inline_asm_elementwise("add.s32 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def reduce_by_assembly_kernel(x, out, N: tl.constexpr):
    tl.store(out, tl.reduce(tl.load(x + tl.arange(0, N)), 0, _by_assembly))


@triton.jit
def float8_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.float8e5).to(tl.float32))


@pytest.mark.parametrize(
    ("kernel", "op", "dtype", "count"),
    [
        (scaled_product_kernel, "tt.dot_scaled", torch.bfloat16, 2),
        (assembly_kernel, "tt.elementwise_inline_asm", torch.int32, 1),
        (reduce_by_assembly_kernel, "tt.elementwise_inline_asm", torch.int32, 1),
        (float8_kernel, "f8E5M2", torch.float32, 1),
    ],
)
def test_what_is_not_compiled_is_named(kernel, op, dtype, count):
    tensors = [torch.ones(64 * 64).to(dtype) for _ in range(count)]
    out = torch.ones(64 * 64, dtype=torch.float32 if op != "tt.elementwise_inline_asm" else torch.int32)
    with pytest.raises(
        native.UnsupportedOpError, match=rf"{kernel.__name__}, \S*test_native\.py:\d+: .*{re.escape(op)}"
    ):
        native.launch(kernel, (1,), *tensors, out, N=64)
