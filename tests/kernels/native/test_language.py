"""Triton's language on the CPU, one thing a test, against NumPy and PyTorch."""

import threading

import numpy as np
import pytest
import torch

from llama_fast import native
from llama_fast.kernels.triton_compat import tl, triton

libdevice = pytest.importorskip("triton.language.extra.libdevice", reason="kernels are Triton's")

pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}"
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int8, torch.int16, torch.int32, torch.int64)


def empty(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


# -- reductions


@triton.jit
def reduce_kernel(
    x, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, AXIS: tl.constexpr, FUNCTION: tl.constexpr
):
    i = tl.arange(0, M)[:, None, None] * (N * K) + tl.arange(0, N)[None, :, None] * K + tl.arange(0, K)[None, None, :]
    y = FUNCTION(tl.load(x + i), axis=AXIS)
    if AXIS == 0:
        j = tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :]
    elif AXIS == 1:
        j = tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :]
    else:
        j = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + j, y)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sum", torch.float32), ("sum", torch.int8), ("sum", torch.float16), ("max", torch.int64), ("max", torch.float32), ("min", torch.int8),
     ("argmax", torch.float32), ("argmin", torch.int32), ("xor_sum", torch.int32)],
)  # fmt: skip
def test_reductions(name, axis, dtype):
    x = torch.randint(-9, 9, (2, 8, 64)).to(dtype)  # ties
    shape = [size for i, size in enumerate(x.shape) if i != axis]
    wide = (
        torch.float32
        if dtype == torch.float32
        else torch.float16
        if dtype == torch.float16
        else torch.int64
        if dtype == torch.int64
        else torch.int32
    )
    out = empty(shape, torch.int32 if "arg" in name else wide if name in ("sum", "xor_sum") else dtype)
    native.launch(reduce_kernel, (1,), x, out, *x.shape, AXIS=axis, FUNCTION=getattr(tl, name))
    n = x.numpy()
    expected = np.bitwise_xor.reduce(n, axis=axis) if name == "xor_sum" else getattr(n, name)(axis=axis)
    np.testing.assert_array_equal(out.numpy(), expected.astype(out.numpy().dtype))


@triton.jit
def reduce_all_kernel(x, out, N: tl.constexpr):
    y = tl.load(x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out, tl.sum(y))
    tl.store(out + 1, tl.max(y))
    tl.store(out + 2, tl.sum(tl.min(y, axis=1), axis=0))
    best, where = tl.max(tl.reshape(y, (N * N,)), axis=0, return_indices=True)
    tl.store(out + 3, best)
    tl.store(out + 4, where.to(tl.float32))


def test_reduction_of_everything_and_with_indices():
    x = torch.randint(-50, 50, (16, 16)).float()
    out = empty(5)
    native.launch(reduce_all_kernel, (1,), x, out, N=16)
    n = x.numpy()
    assert out.tolist() == [n.sum(), n.max(), n.min(axis=1).sum(), n.max(), n.argmax()]


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _last_nonzero(a, b):
    return tl.where(b != 0, b, a)


@triton.jit
def _affine(a, b, c, d):  # x -> a x + b, then x -> c x + d
    return a * c, b * c + d


@triton.jit
def scan_kernel(
    x, out, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr, WHAT: tl.constexpr
):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    y = tl.load(x + i)
    if WHAT == "cumsum":
        z = tl.cumsum(y, axis=AXIS, reverse=REVERSE)
    elif WHAT == "cumprod":
        z = tl.cumprod(y, axis=AXIS, reverse=REVERSE)
    elif WHAT == "last":
        z = tl.associative_scan(y, AXIS, _last_nonzero, reverse=REVERSE)
    else:
        _, z = tl.associative_scan((y, y + 1), AXIS, _affine, reverse=REVERSE)
    tl.store(out + i, z)


@pytest.mark.parametrize("what", ["cumsum", "cumprod", "last", "affine"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_scans(what, axis, reverse, dtype):
    x = torch.randint(-1, 2, (4, 16)).to(dtype)
    out = empty(x.shape, dtype)
    native.launch(scan_kernel, (1,), x, out, 4, 16, AXIS=axis, REVERSE=reverse, WHAT=what)
    n = x.numpy().copy() if axis == 0 else x.numpy().T.copy()
    n = n[::-1] if reverse else n
    expected, before = n.copy(), None
    b = n + 1
    for i, row in enumerate(n):
        if before is None:
            before = row if what != "affine" else b[0]
        elif what == "affine":
            before = before * row + b[i]
        else:
            before = {"cumsum": before + row, "cumprod": before * row, "last": np.where(row != 0, row, before)}[what]
        expected[i] = before
    expected = expected[::-1] if reverse else expected
    np.testing.assert_array_equal(out.numpy(), expected if axis == 0 else expected.T)


# -- sorting and moving


@triton.jit
def sort_kernel(x, out, M: tl.constexpr, N: tl.constexpr, DESCENDING: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + i, tl.sort(tl.load(x + i), descending=DESCENDING))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("n", [4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.float16, torch.int64])
def test_sort(dtype, n, descending):
    x = torch.randint(-99, 99, (2, n)).to(dtype)
    out = empty(x.shape, dtype)
    native.launch(sort_kernel, (1,), x, out, 2, n, DESCENDING=descending)
    assert torch.equal(out, x.sort(descending=descending).values)


@triton.jit
def topk_kernel(x, out, N: tl.constexpr, K: tl.constexpr):
    tl.store(out + tl.arange(0, K), tl.topk(tl.load(x + tl.arange(0, N)), K))


def test_topk():
    x, out = torch.randperm(64).float(), empty(8)
    native.launch(topk_kernel, (1,), x, out, 64, 8)
    assert torch.equal(out, x.topk(8).values)


@triton.jit
def move_kernel(x, out, M: tl.constexpr, N: tl.constexpr, WHAT: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    y = tl.load(x + i)
    flat = tl.arange(0, M * N)
    if WHAT == "flip0":
        tl.store(out + i, tl.flip(y, 0))
    elif WHAT == "flip1":
        tl.store(out + i, tl.flip(y, 1))
    elif WHAT == "trans":
        tl.store(out + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(y))
    elif WHAT == "reshape":
        tl.store(out + flat, tl.reshape(tl.trans(y), (M * N,)))
    elif WHAT == "ravel":
        tl.store(out + flat, tl.ravel(y + 1))
    elif WHAT == "permute":
        z = tl.permute(tl.reshape(y, (M, 4, N // 4)), (2, 0, 1))
        tl.store(out + flat, tl.reshape(z, (M * N,)))
    elif WHAT == "join":
        z = tl.join(y, y * 2)
        tl.store(out + tl.arange(0, 2 * M * N), tl.reshape(z, (2 * M * N,)))
    elif WHAT == "split":
        a, b = tl.split(tl.reshape(y, (M, N // 2, 2)))
        j = tl.arange(0, M)[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :]
        tl.store(out + j, a)
        tl.store(out + M * N // 2 + j, b)
    elif WHAT == "interleave":
        z = tl.interleave(y, -y)
        tl.store(out + tl.arange(0, M)[:, None] * (2 * N) + tl.arange(0, 2 * N)[None, :], z)
    elif WHAT == "cat":
        z = tl.cat(tl.reshape(y, (M * N,)), tl.reshape(y + 100, (M * N,)), can_reorder=True)
        tl.store(out + tl.arange(0, 2 * M * N), z)
    elif WHAT == "gather0":
        tl.store(out + i, tl.gather(y, (i * 7 + 3) % M, 0))
    elif WHAT == "gather1":
        tl.store(out + i, tl.gather(y, (i * 7 + 3) % N, 1))
    elif WHAT == "broadcast":
        tl.store(out + i, y + tl.sum(y, 1)[:, None] * tl.max(y, 0)[None, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize(
    "what",
    ["flip0", "flip1", "trans", "reshape", "ravel", "permute", "join", "split", "interleave", "cat", "gather0", "gather1", "broadcast"],
)  # fmt: skip
def test_moves(what, dtype):
    shape = (4, 32) if dtype == torch.int16 else (16, 8)
    x = torch.randint(-9, 9, shape).to(dtype)
    m, n = shape
    out = empty(m * n * (2 if what in ("join", "interleave", "cat") else 1), dtype)
    native.launch(move_kernel, (1,), x, out, m, n, WHAT=what)
    i = torch.arange(m * n).reshape(m, n) * 7 + 3
    expected = {
        "flip0": lambda: x.flip(0), "flip1": lambda: x.flip(1), "trans": lambda: x.T, "reshape": lambda: x.T, "ravel": lambda: x + 1,
        "permute": lambda: x.reshape(m, 4, n // 4).permute(2, 0, 1), "join": lambda: torch.stack((x, x * 2), -1),
        "split": lambda: x.reshape(m, n // 2, 2).permute(2, 0, 1), "interleave": lambda: torch.stack((x, -x), -1),
        "cat": lambda: torch.cat((x.flatten(), x.flatten() + 100)), "gather0": lambda: x.gather(0, i % m), "gather1": lambda: x.gather(1, i % n),
        "broadcast": lambda: x + x.sum(1, keepdim=True, dtype=dtype) * x.max(0, keepdim=True).values,
    }[what]()  # fmt: skip
    assert torch.equal(out, expected.reshape(-1))


# -- products


@triton.jit
def dot_kernel(
    a, b, c, m, n, k, sam, sak, sbk, sbn, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    im, i_n, ik = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + im[:, None] * sam + ik[None, :] * sak, (im[:, None] < m) & (ik[None, :] < k), 0)
    if TRANSPOSE:
        y = tl.load(b + i_n[:, None] * sbn + ik[None, :] * sbk, (i_n[:, None] < n) & (ik[None, :] < k), 0).T
    else:
        y = tl.load(b + ik[:, None] * sbk + i_n[None, :] * sbn, (ik[:, None] < k) & (i_n[None, :] < n), 0)
    z = tl.dot(x, y, out_dtype=OUT, input_precision="ieee")
    tl.store(c + im[:, None] * n + i_n[None, :], z, (im[:, None] < m) & (i_n[None, :] < n))


OUT = {torch.float64: tl.float64, torch.int8: tl.int32}
TORCH_OUT = {torch.float64: torch.float64, torch.int8: torch.int32}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("transpose", [False, True])
def test_dot(dtype, layout, transpose):
    for shape in ((13, 5, 19), (1, 16, 32), (16, 11, 3)):
        check_dot(shape, dtype, layout, transpose)


def check_dot(shape, dtype, layout, transpose):
    m, n, k = shape
    a, b = (torch.randint(-4, 5, size).to(dtype) for size in ((m, k), (k, n)))
    a = a if layout[0] == "n" else a.T.contiguous().T
    b = b if layout[1] == "n" else b.T.contiguous().T
    out = TORCH_OUT.get(dtype, torch.float32)
    c = empty((m, n), out)
    native.launch(
        dot_kernel, (1,), a, b, c, m, n, k, *a.stride(), *b.stride(), 16, 16, 32, TRANSPOSE=transpose, OUT=OUT.get(dtype, tl.float32)
    )  # fmt: skip
    assert torch.equal(c, (a.double() @ b.double()).to(out))


@triton.jit
def batched_dot_kernel(a, b, c, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    ib, im, i_n, ik = tl.arange(0, B), tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + ib[:, None, None] * (M * K) + im[None, :, None] * K + ik[None, None, :])
    y = tl.load(b + ib[:, None, None] * (K * N) + ik[None, :, None] * N + i_n[None, None, :])
    z = tl.dot(x + 1, y, input_precision="ieee")
    tl.store(c + ib[:, None, None] * (M * N) + im[None, :, None] * N + i_n[None, None, :], z)


def test_batched_dot():
    a, b = torch.randint(-4, 5, (4, 16, 32)).float(), torch.randint(-4, 5, (4, 32, 16)).float()
    c = empty((4, 16, 16))
    native.launch(batched_dot_kernel, (1,), a, b, c, 4, 16, 16, 32)
    assert torch.equal(c, (a + 1) @ b)


@triton.jit
def chained_dot_kernel(a, b, c, N: tl.constexpr, ROUNDS: tl.constexpr):
    """Operands that are carried, computed, and transposed."""
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(a + i), tl.load(b + i)
    z = tl.zeros((N, N), tl.float32)
    for _ in range(ROUNDS):
        z = tl.dot(x, tl.trans(y), z, input_precision="ieee")
        x, y = tl.trans(y) * 0.5, x
    tl.store(c + i, z)


def test_dots_of_carried_operands():
    a, b = torch.randint(-4, 5, (2, 16, 16)).float()
    c, x, y, z = empty((16, 16)), a, b, 0
    native.launch(chained_dot_kernel, (1,), a, b, c, 16, ROUNDS=5)
    for _ in range(5):
        z = x @ y.T + z
        x, y = y.T * 0.5, x
    assert torch.equal(c, z)


# -- control flow


@triton.jit
def collatz_kernel(x, out):
    n = tl.load(x + tl.program_id(0))
    steps = 0
    while n != 1:
        if n % 2 == 0:  # noqa: SIM108
            n = n // 2
        else:
            n = 3 * n + 1
        steps += 1
    tl.store(out + tl.program_id(0), steps)


def test_while():
    x, out = torch.arange(1, 30, dtype=torch.int32), empty(29, torch.int32)
    native.launch(collatz_kernel, (29,), x, out)

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.tolist() == [steps(n) for n in range(1, 30)]


@triton.jit
def while_tile_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i)
    rounds = 0
    while (tl.max(y, 0) > 1.0) & (rounds < 40):
        y = tl.where(y > 1.0, y / 2, y)
        rounds += 1
    tl.store(out + i, y + rounds)


def test_while_over_a_tile():
    x = torch.rand(32) * 1000
    out = empty(32)
    native.launch(while_tile_kernel, (1,), x, out, N=32)
    y, rounds = x.clone(), 0
    while y.max() > 1:
        y, rounds = torch.where(y > 1, y / 2, y), rounds + 1
    assert torch.equal(out, y + rounds)


@triton.jit
def sums_kernel(p_x, p_y, p_sums, M, N: tl.constexpr):
    o = tl.arange(0, N)
    sums = tl.zeros([N], dtype=tl.float32)
    before = tl.zeros([N], dtype=tl.float32)
    for i in range(M):
        x = tl.load(p_x + i * N + o)
        tl.store(p_y + i * N + o, x + before)
        before = sums
        sums += x
    tl.store(p_sums + o, sums)
    tl.store(p_sums + N + o, before)


def test_what_a_loop_carries_is_written_with_its_stores():
    x, y, sums = torch.randn(5, 64), torch.full((5, 64), torch.nan), torch.full((2, 64), torch.nan)
    native.launch(sums_kernel, (1,), x, y, sums, 5, N=64)
    running = torch.cat([torch.zeros(2, 64), x.cumsum(0)])
    torch.testing.assert_close(y, x + running[:5])
    torch.testing.assert_close(sums, running[[6, 5]])


@triton.jit
def branches_kernel(p_x, p_y, flag, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(p_x + o)
    twice = x + x
    if flag:
        tl.store(p_y + o, x)
        a, b = twice, twice
    else:
        a, b = twice + 1, x
    tl.store(p_y + N + o, a)
    tl.store(p_y + 2 * N + o, b)
    tl.store(p_y + 3 * N + o, twice)


@pytest.mark.parametrize("flag", [False, True])
def test_a_branch_gives_what_was_made_before_it(flag):
    x, y = torch.randn(512), torch.zeros(4, 512)
    native.launch(branches_kernel, (1,), x, y, flag, N=512)
    wanted = [x, 2 * x, 2 * x, 2 * x] if flag else [0 * x, 2 * x + 1, x, 2 * x]
    assert torch.equal(y, torch.stack(wanted))


@triton.jit
def nested_kernel(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i)
    z = y * 0
    p = x + i
    for a in range(n):
        for b in range(a, n, 2):
            if (a + b) % 3 == 0:
                y, z = z + b, y
                p += 1
            elif b > 4:
                z = tl.flip(z, 0) + tl.load(p)
            else:
                if a == 1:
                    y += 1
        for _ in range(3, 0, -1):
            z += 1
    tl.store(out + i, y)
    tl.store(out + N + i, z)


@pytest.mark.parametrize("n", [0, 1, 6])
def test_nested_loops_and_ifs_that_carry_tiles_and_pointers(n):
    x = torch.randint(-9, 9, (64,)).float()
    out = empty(32)
    native.launch(nested_kernel, (1,), x, out, n, N=16)
    y, z, p = x[:16], torch.zeros(16), 0
    for a in range(n):
        for b in range(a, n, 2):
            if (a + b) % 3 == 0:
                y, z, p = z + b, y, p + 1
            elif b > 4:
                z = z.flip(0) + x[p : p + 16]
            elif a == 1:
                y = y + 1
        z = z + 3
    assert torch.equal(out, torch.cat((y, z)))


@triton.jit
def swap_kernel(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + i), tl.load(x + N * N + i)
    q = out + i
    for _ in range(n):
        a, b = b, tl.trans(a)
    for _ in range(n):
        a = tl.trans(a) + 1
    tl.store(q, a)
    tl.store(q + N * N, b)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_tiles_that_are_swapped_and_transposed(n):
    x = torch.randint(-9, 9, (2, 8, 8)).float()
    out = empty((2, 8, 8))
    native.launch(swap_kernel, (1,), x, out, n, N=8)
    a, b = x
    for _ in range(n):
        a, b = b, a.T
    for _ in range(n):
        a = a.T + 1
    assert torch.equal(out, torch.stack((a, b)))


@triton.jit
def early_return_kernel(x, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    if pid * BLOCK >= n:
        return
    i = pid * BLOCK + tl.arange(0, BLOCK)
    if tl.load(x + pid * BLOCK) < 0:
        tl.store(x + i, tl.zeros((BLOCK,), tl.float32), i < n)
        return
    tl.store(x + i, tl.load(x + i, i < n) * 2, i < n)


def test_early_return():
    x = torch.arange(-8.0, 56.0)
    expected = x * 2
    expected[:16] = 0
    expected[50:] = x[50:]
    native.launch(early_return_kernel, (8,), x, 50, BLOCK=16)
    assert torch.equal(x, expected)


@triton.jit
def pointer_choice_kernel(a, b, out, which, N: tl.constexpr):
    i = tl.arange(0, N)
    if which > 0:  # noqa: SIM108
        p = a
    else:
        p = b
    q = tl.where(i < 5, a + i, b + i)
    tl.store(out + i, tl.load(p + i) + tl.load(q))


@pytest.mark.parametrize("which", [-1, 2])
def test_pointers_that_are_chosen(which):
    a, b, out = torch.rand(16), torch.rand(16), empty(16)
    native.launch(pointer_choice_kernel, (1,), a, b, out, which, N=16)
    assert torch.equal(out, (a if which > 0 else b) + torch.where(torch.arange(16) < 5, a, b))


@triton.jit
def _plus(x, y):
    return x + y


@triton.jit(noinline=True)
def _kept_apart(x, y):
    z = x
    if y > 3:
        z = x * y
    return z


@triton.jit
def calls_kernel(x, out, N: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(out + pid, _plus(_kept_apart(tl.load(x + pid), pid), _kept_apart(pid, 2)))


def test_device_functions_inlined_or_not():
    x, out = torch.arange(8, dtype=torch.int32) + 10, empty(8, torch.int32)
    native.launch(calls_kernel, (8,), x, out, N=8)
    assert out.tolist() == [(10 + i) * (i if i > 3 else 1) + i for i in range(8)]


# -- numbers


@triton.jit
def binary_kernel(x, y, out, comparisons, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, i < n), tl.load(y + i, i < n)
    out += i
    tl.store(out, a + b, i < n)
    tl.store(out + n, a - b, i < n)
    tl.store(out + 2 * n, a * b, i < n)
    tl.store(out + 3 * n, a // b, i < n)
    tl.store(out + 4 * n, a % b, i < n)
    tl.store(out + 5 * n, a & b, i < n)
    tl.store(out + 6 * n, a | b, i < n)
    tl.store(out + 7 * n, a ^ b, i < n)
    tl.store(out + 8 * n, a << (b & 7), i < n)
    tl.store(out + 9 * n, a >> (b & 7), i < n)
    tl.store(out + 10 * n, tl.maximum(a, b), i < n)
    tl.store(out + 11 * n, tl.minimum(a, b), i < n)
    tl.store(out + 12 * n, tl.cdiv(a & 31, b), i < n)
    tl.store(out + 13 * n, tl.where(a > 3, ~a, b), i < n)
    tl.store(comparisons + i, a < b, i < n)
    tl.store(comparisons + n + i, a == b, i < n)


def truncated(a, b):
    q = np.abs(a.astype(object)) // np.abs(b.astype(object))
    return np.where((a < 0) != (b < 0), -q, q)


@pytest.mark.parametrize("dtype", [*INTS, torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_integers(dtype):
    """With a length that is no multiple of the block: the masked lanes divide by zero."""
    info, n = torch.iinfo(dtype), 100
    low, high = max(info.min, -(2**62)), min(info.max, 2**62)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(low, high, n, dtype=np.dtype(str(dtype).removeprefix("torch."))) for _ in range(2))
    a[:8], b[:8] = [0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 1]
    b[50:] = b[50:] % 5 + 1
    b[b == 0] = 1
    out, comparisons = empty((14, n), dtype), empty((2, n), torch.bool)
    native.launch(binary_kernel, (2,), torch.from_numpy(a), torch.from_numpy(b), out, comparisons, n, BLOCK=64)
    with np.errstate(over="ignore"):
        expected = [
            a + b, a - b, a * b, truncated(a, b), a.astype(object) - truncated(a, b) * b, a & b, a | b, a ^ b, a << (b & 7), a >> (b & 7),
            np.maximum(a, b), np.minimum(a, b), truncated((a & 31) + b - 1, b), np.where(a > 3, ~a, b),
        ]  # fmt: skip
    for row, (got, wanted) in enumerate(zip(out.numpy(), expected, strict=True)):
        difference = [(int(x) - int(y)) % 2**info.bits for x, y in zip(got, wanted, strict=True)]
        assert not any(difference), row
    np.testing.assert_array_equal(comparisons.numpy(), [a < b, a == b])


@triton.jit
def convert_kernel(x, f16, bf16, f32, f64, i8, i16, i32, i64, b, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i)
    tl.store(f16 + i, y.to(tl.float16))
    tl.store(bf16 + i, y.to(tl.bfloat16))
    tl.store(f32 + i, y.to(tl.float32))
    tl.store(f64 + i, y.to(tl.float64))
    tl.store(i8 + i, y.to(tl.int8))
    tl.store(i16 + i, y.to(tl.int16))
    tl.store(i32 + i, y.to(tl.int32))
    tl.store(i64 + i, y.to(tl.int64))
    tl.store(b + i, y.to(tl.int1))


@pytest.mark.parametrize("source", [*FLOATS, *INTS, torch.uint8, torch.uint16, torch.uint32, torch.bool], ids=str)
def test_conversions(source):
    x = torch.tensor([0, 1, 2, 3, 100, 77.5, 0.25, 5] * 4)
    if source in (*FLOATS, *INTS):
        x = torch.cat((x[:16], -x[:16]))
    x = x.to(source)
    outs = [empty(32, target) for target in (*FLOATS, *INTS, torch.bool)]
    native.launch(convert_kernel, (1,), x, *outs, N=32)
    for out in outs:
        assert torch.equal(out, x.to(out.dtype)), out.dtype


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("target", "halfway"),
    [
        (torch.float16, [1 + 2**-11, 3 + 2**-10, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 65520.0, 0.1, 1e300]),
        (torch.bfloat16, [1 + 2**-8, 3 + 2**-7, 1 + 3 * 2**-8, 2**-126 * (1 + 2**-8), 511 * 2.0**119, 0.1, 7.0, 1e300]),
    ],
    ids=str,
)
def test_float64_is_rounded_once(target, halfway, sign):
    """float32 between would lose what decides: a little above or below halfway between two numbers of 16 bits."""
    x = sign * torch.tensor(halfway, dtype=torch.float64)
    x = torch.cat((x, torch.nextafter(x, torch.zeros_like(x)), torch.nextafter(x, 2 * x), torch.zeros(8).double()))
    outs = [empty(32, kind) for kind in (*FLOATS, *INTS, torch.bool)]
    native.launch(convert_kernel, (1,), x, *outs, N=32)
    assert torch.equal(outs[FLOATS.index(target)].double(), rounded_once(x, target))


def rounded_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 x at the nearest number of the dtype, in float64: the even one of two."""
    digits, least, largest = {torch.float16: (10, -24, 15), torch.bfloat16: (7, -133, 127)}[dtype]
    size = x.abs()
    exponent = torch.frexp(size.clamp(max=2.0**1000))[1] - 1
    step = torch.ldexp(torch.ones_like(x), (exponent - digits).clamp(min=least))
    near = torch.round(size / step) * step
    near = torch.where(near >= 2.0 ** (largest + 1), torch.inf, near)
    return torch.copysign(near, x)


@triton.jit
def boolean_kernel(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i, i < 20, other=True)
    seen = i < 0
    for k in range(n):
        seen = seen | (y & (i % (k + 2) == 0))
    flag = tl.sum(y.to(tl.int32), 0) > 3
    tl.store(out + i, seen ^ flag)
    tl.store(out + N, flag)


def test_booleans_are_loaded_carried_and_stored():
    x, out = torch.rand(32) < 0.5, torch.zeros(33, dtype=torch.bool)
    native.launch(boolean_kernel, (1,), x, out, 3, N=32)
    i = torch.arange(32)
    y = torch.where(i < 20, x, True)
    seen = y & ((i % 2 == 0) | (i % 3 == 0) | (i % 4 == 0))
    assert torch.equal(out, torch.cat((seen ^ True, torch.tensor([True]))))


@triton.jit
def math_kernel(x, out, N: tl.constexpr, WHAT: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    if WHAT == "fma":
        b = tl.fma(a, a, a)
    elif WHAT == "clamp":
        b = tl.clamp(a, 0.5, 1.5)
    elif WHAT == "fdiv":
        b = tl.fdiv(a, a + 1)
    elif WHAT == "div_rn":
        b = tl.div_rn(a, a + 1)
    elif WHAT == "umulhi":
        b = tl.umulhi(a.to(tl.uint32) * 123456789, 987654321).to(tl.float32)
    elif WHAT == "softmax":
        b = tl.softmax(a)
    elif WHAT == "sigmoid":
        b = tl.sigmoid(a)
    else:
        b = WHAT(a)
    tl.store(out + i, b)


@pytest.mark.parametrize(
    "name", ["exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "sqrt_rn", "rsqrt", "abs", "floor", "ceil", "erf", "fma", "clamp", "fdiv", "div_rn",
             "umulhi", "softmax", "sigmoid"],
)  # fmt: skip
def test_mathematics(name):
    x = torch.rand(64) * 4 + 0.01
    out = empty(64)
    native.launch(
        math_kernel,
        (1,),
        x,
        out,
        N=64,
        WHAT=getattr(tl, name)
        if hasattr(torch, name.removesuffix("_rn")) and name not in ("fma", "clamp", "softmax", "sigmoid", "div_rn")
        else name,
    )
    other = {
        "fma": lambda x: x * x + x, "clamp": lambda x: x.clamp(0.5, 1.5), "fdiv": lambda x: x / (x + 1), "div_rn": lambda x: x / (x + 1),
        "umulhi": lambda x: ((((x.long() * 123456789) % 2**32) * 987654321) >> 32), "softmax": lambda x: x.softmax(0), "sqrt_rn": torch.sqrt,
    }  # fmt: skip
    expected = (other.get(name) or getattr(torch, name))(x.double() if name != "umulhi" else x)
    torch.testing.assert_close(out.double(), expected.double(), rtol=1e-6, atol=1e-7)


@triton.jit
def libdevice_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(out + i, libdevice.exp(a))
    tl.store(out + N + i, libdevice.tanh(a))
    tl.store(out + 2 * N + i, libdevice.atan(a))
    tl.store(out + 3 * N + i, libdevice.rint(a))
    tl.store(out + 4 * N + i, libdevice.rsqrt(a))
    tl.store(out + 5 * N + i, libdevice.log1p(a))
    tl.store(out + 6 * N + i, libdevice.erfc(a))
    tl.store(out + 7 * N + i, libdevice.atan2(a, a + 1))
    tl.store(out + 8 * N + i, libdevice.pow(a, a))
    tl.store(out + 9 * N + i, libdevice.fast_expf(a) if x.dtype.element_ty == tl.float32 else libdevice.log10(a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_libdevice(dtype):
    x = torch.rand(32, dtype=dtype) * 3 + 0.05
    out = empty((10, 32), dtype)
    native.launch(libdevice_kernel, (1,), x, out, N=32)
    y = x.double()
    last = y.exp() if dtype == torch.float32 else y.log10()
    expected = torch.stack(
        [y.exp(), y.tanh(), y.atan(), y.round(), y.rsqrt(), y.log1p(), torch.erfc(y), torch.atan2(y, y + 1), y**y, last]
    )
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@triton.jit
def random_kernel(out, ints, seed, N: tl.constexpr, NORMAL: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.randn(seed, i) if NORMAL else tl.rand(seed, i))
    tl.store(ints + i, tl.randint(seed, i))


def philox(seed, i):
    """Triton's Philox 4x32, 10 rounds: the first of the four numbers."""
    mask = 2**32 - 1
    c = [i & mask, 0, 0, 0]
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & mask, (a >> 32) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 7])
def test_random_numbers_have_philox_bits(seed):
    out, ints = empty(256), empty(256, torch.int32)
    native.launch(random_kernel, (1,), out, ints, seed, N=256, NORMAL=False)
    expected = np.array([philox(seed, i)[0] for i in range(256)], dtype=np.uint32).view(np.int32)
    np.testing.assert_array_equal(ints.numpy(), expected)
    uniform = np.where(expected < 0, -expected - 1, expected).astype(np.float32) * np.float32(4.6566127342e-10)
    np.testing.assert_array_equal(out.numpy(), uniform)
    native.launch(random_kernel, (1,), out, ints, seed, N=256, NORMAL=True)
    assert abs(out.mean()) < 0.2 and abs(out.std() - 1) < 0.2


# -- atomics, histograms


@triton.jit
def atomic_kernel(x, index, out, before, n, BLOCK: tl.constexpr, WHAT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, j = tl.load(x + i, i < n), tl.load(index + i, i < n)
    if WHAT == "add":
        old = tl.atomic_add(out + j, y, i < n)
    elif WHAT == "max":
        old = tl.atomic_max(out + j, y, i < n)
    elif WHAT == "min":
        old = tl.atomic_min(out + j, y, i < n)
    elif WHAT == "or":
        old = tl.atomic_or(out + j, y, i < n)
    elif WHAT == "and":
        old = tl.atomic_and(out + j, y, i < n)
    elif WHAT == "xor":
        old = tl.atomic_xor(out + j, y, i < n)
    else:
        old = tl.atomic_xchg(out + j, y, i < n)
    tl.store(before + i, old, i < n)


@pytest.mark.parametrize(
    ("what", "dtype"),
    [
        *((what, dtype) for what in ("add", "max", "min", "xchg") for dtype in (torch.int32, torch.float32)),
        *((what, torch.uint32) for what in ("max", "min", "or")), *((what, torch.int64) for what in ("add", "and", "xor")),
        *((what, torch.float64) for what in ("add", "max")), ("add", torch.float16), ("add", torch.bfloat16),
    ],
)  # fmt: skip
def test_atomics(what, dtype):
    low = 0 if dtype == torch.uint32 else -9
    x, index = torch.randint(low, 9, (100,)).to(dtype), torch.randperm(100) % 10
    out = torch.arange(10).to(dtype)
    before = empty(100, dtype)
    expected, old = out.clone().double().numpy(), []
    functions = {
        "add": lambda a, b: a + b, "max": max, "min": min, "or": lambda a, b: int(a) | int(b), "and": lambda a, b: int(a) & int(b),
        "xor": lambda a, b: int(a) ^ int(b), "xchg": lambda a, b: b,
    }  # fmt: skip
    for value, j in zip(x.double().tolist(), index.tolist(), strict=True):
        old.append(expected[j])
        expected[j] = functions[what](expected[j], value)
    torch.set_num_threads(1)
    native.launch(atomic_kernel, (2,), x, index, out, before, 100, BLOCK=64, WHAT=what)
    np.testing.assert_array_equal(out.double().numpy(), expected)
    if not (
        dtype.is_floating_point and what in ("max", "min")
    ):  # Triton makes two atomics of them, by sign, one after the other
        np.testing.assert_array_equal(before.double().numpy(), old)


@triton.jit
def cas_kernel(lock, counter, log):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    value = tl.load(counter)
    tl.store(counter, value + 1)
    tl.store(log + value, tl.program_id(0))
    tl.atomic_xchg(lock, 0)


def test_a_lock_by_compare_and_swap():
    lock, counter, log = (torch.zeros(n, dtype=torch.int32) for n in (1, 1, 64))
    native.launch(cas_kernel, (64,), lock, counter, log)
    assert counter.item() == 64 and log.sort().values.tolist() == list(range(64))


@triton.jit
def cas_tile_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.atomic_cas(x + i, i, i + 100))


def test_compare_and_swap_of_a_tile():
    x = torch.arange(16, dtype=torch.int32)
    x[3] = 5
    before, out = x.clone(), empty(16, torch.int32)
    native.launch(cas_tile_kernel, (1,), x, out, N=16)
    assert torch.equal(out, before)
    assert x.tolist() == [5 if i == 3 else i + 100 for i in range(16)]


@triton.jit
def histogram_kernel(x, out, n, N: tl.constexpr, BINS: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i, i < n, 0)
    tl.store(out + tl.arange(0, BINS), tl.histogram(y, BINS, mask=i < n))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_histogram(dtype):
    x, out = torch.randint(0, 8, (50,)).to(dtype), empty(8, torch.int32)
    native.launch(histogram_kernel, (1,), x, out, 50, N=64, BINS=8)
    assert out.tolist() == np.bincount(x.numpy(), minlength=8).tolist()


# -- memory that is read and written


@triton.jit
def shift_kernel(x, y, N: tl.constexpr):
    """Reads all, then writes one further."""
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.flip(tl.load(x + i), 0)
    tl.store(y + i, a)
    tl.store(y + N + i, b)


def test_overlapping_arguments():
    x = torch.arange(66.0)
    before = x.clone()
    native.launch(shift_kernel, (1,), x, x[1:], N=32)
    assert torch.equal(x[1:33], before[:32]) and torch.equal(x[33:65], before[:32].flip(0))


@triton.jit
def reread_kernel(x, N: tl.constexpr):
    i = tl.arange(0, N)
    for _ in range(3):
        y = tl.load(x + i)
        tl.store(x + i, y + 1)
        z = tl.load(x + (N - 1 - i))
        tl.store(x + i, y * z)


def test_a_kernel_reads_what_it_stored():
    x = torch.randint(-3, 3, (16,)).double()
    y = x.clone()
    native.launch(reread_kernel, (1,), x, N=16)
    for _ in range(3):
        y = y * (y + 1).flip(0)
    assert torch.equal(x, y)


@triton.jit
def transposed_in_place_kernel(x, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(x + j * N + i, tl.load(x + i * N + j) + tl.sum(tl.load(x + i * N + j), 1)[:, None])


def test_transposed_in_place():
    x = torch.randint(-9, 9, (16, 16)).float()
    expected = (x + x.sum(1, keepdim=True)).T.clone()
    native.launch(transposed_in_place_kernel, (1,), x, N=16)
    assert torch.equal(x, expected)


@triton.jit
def order_kernel(x, y, N: tl.constexpr):
    """What is stored first is overwritten, what is stored is read, what was loaded is kept."""
    i = tl.arange(0, N)
    before = tl.load(x + (N - 1 - i))
    tl.store(x + i * 2, tl.load(x + i))
    tl.store(x + N - i, before)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i + 1))
    _, b = tl.split(tl.reshape(tl.load(y + i), (N // 2, 2)))
    j = tl.arange(0, N // 2)
    tl.store(y + 2 * j, tl.gather(b, (j + 3) % (N // 2), 0))


def test_stores_and_loads_happen_in_order():
    n = 64
    x, y = torch.arange(2.0 * n), torch.zeros(n)
    wanted_x, wanted_y = x.clone(), y.clone()
    native.launch(order_kernel, (1,), x, y, N=n)
    before, i = wanted_x[:n].flip(0).clone(), torch.arange(n)
    wanted_x[: 2 * n : 2] = wanted_x[:n].clone()
    wanted_x[n - i] = before
    wanted_y[:] = wanted_x[:n] + wanted_x[1 : n + 1]
    wanted_y[::2] = wanted_y[1::2].roll(-3).clone()
    assert torch.equal(x, wanted_x) and torch.equal(y, wanted_y)


@triton.jit
def swapped_pointers_kernel(x, y, n, N: tl.constexpr):
    i = tl.arange(0, N)
    p, q = x + i, y + i
    for _ in range(n):
        a = tl.load(p)
        tl.store(q + 1, a + 1)
        tl.store(p, tl.flip(a, 0))
        p, q = q, p


def test_pointers_that_are_swapped_may_be_either():
    x, y = torch.rand(33), torch.rand(33)
    p, q = x.clone(), y.clone()
    native.launch(swapped_pointers_kernel, (1,), x, y, 3, N=32)
    wanted = (p, q)
    for _ in range(3):
        a = p[:32].clone()
        q[1:] = a + 1
        p[:32] = a.flip(0)
        p, q = q, p
    assert torch.equal(x, wanted[0]) and torch.equal(y, wanted[1])


def test_arguments_that_overlap_through_a_third():
    x = torch.arange(64.0)
    expected = torch.cat((x[:32].clone(), x[:32].flip(0)))
    native.launch(three_kernel, (1,), x[:32], x[32:], x, N=32)
    assert torch.equal(x, expected)


@triton.jit
def three_kernel(a, b, whole, N: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(a + i)
    tl.store(whole + i, tl.flip(y, 0))
    tl.store(b + i, tl.load(a + i))
    tl.store(a + i, y)


@triton.jit
def long_kernel(x, out, N: tl.constexpr, LENGTH: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i)
    for k in tl.static_range(LENGTH):
        y = y * 0.5 + k
    tl.store(out + i, y)


def test_a_formula_of_hundreds_of_steps():
    x, out = torch.rand(32), empty(32)
    native.launch(long_kernel, (1,), x, out, 32, LENGTH=600)
    y = x
    for k in range(600):
        y = y * 0.5 + k
    assert torch.equal(out, y)


@triton.jit
def descriptor_kernel(x, out, M, N, B: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [B, B])
    target = tl.make_tensor_descriptor(out, [M, N], [N, 1], [B, B])
    for i in range(0, N, B):
        target.store([0, i], source.load([0, i]) * 2)


@triton.jit
def block_pointer_kernel(x, out, M, N, B: tl.constexpr):
    p = tl.make_block_ptr(x, (M, N), (N, 1), (0, 0), (B, B), (1, 0))
    q = tl.make_block_ptr(out, (M, N), (N, 1), (0, 0), (B, B), (1, 0))
    for _ in range(0, N, B):
        tl.store(q, tl.load(p, boundary_check=(0, 1)) * 2, boundary_check=(0, 1))
        p = tl.advance(p, (0, B))
        q = tl.advance(q, (0, B))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize("kernel", [descriptor_kernel, block_pointer_kernel])
def test_descriptors_and_block_pointers(kernel):
    x, out = torch.rand(20, 28), torch.zeros(20, 28)
    native.launch(kernel, (1,), x, out, 20, 28, B=16)
    assert torch.equal(out[:16], x[:16] * 2) and not out[16:].any()


@triton.jit
def large_tiles_kernel(p_x, p_y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_square = tl.zeros([BLOCK], tl.float32)
    for _ in range(3):
        b_x = tl.load(p_x + offsets)
        b_sum += b_x
        b_square += b_x * b_x
    tl.store(p_y + offsets, b_sum + b_square)


def test_tiles_of_8_mib_need_no_stack():
    x, y = torch.full((2**20,), 2.0), torch.empty(2**20)

    def work():
        native.launch(large_tiles_kernel, (1,), x, y, BLOCK=2**20)

    before = threading.stack_size(2**20)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert (y == 18).all()
