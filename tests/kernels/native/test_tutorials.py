"""The algorithms of Triton's tutorials, written anew, against PyTorch."""

import math

import pytest
import torch
from torch.nn import functional as F

from llama_fast import native
from llama_fast.kernels.triton_compat import tl, triton

pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}"
)


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + tl.load(y + i, i < n), i < n)


@pytest.mark.parametrize("n", [1, 1023, 98432])
def test_vector_add(n):
    x, y = torch.rand(n), torch.rand(n)
    out = torch.empty(n)
    native.launch(add_kernel, lambda given: (triton.cdiv(n, given["BLOCK"]),), x, y, out, n, BLOCK=1024)
    assert torch.equal(out, x + y)


@triton.jit
def softmax_kernel(x, out, stride_x, stride_out, rows, columns, BLOCK: tl.constexpr):
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=2):
        i = tl.arange(0, BLOCK)
        y = tl.load(x + row * stride_x + i, i < columns, -float("inf"))
        e = tl.exp(y - tl.max(y, axis=0))
        tl.store(out + row * stride_out + i, e / tl.sum(e, axis=0), i < columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 781), (8, 128)])
def test_softmax(rows, columns):
    x = torch.randn(rows, columns)
    out = torch.empty(rows, columns)
    native.launch(
        softmax_kernel,
        (4,),
        x,
        out,
        *x.stride()[:1],
        *out.stride()[:1],
        rows,
        columns,
        BLOCK=triton.next_power_of_2(columns),
    )
    torch.testing.assert_close(out, x.softmax(1), rtol=1e-6, atol=1e-8)


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Blocks of C in groups of rows, for the cache; pointers that are carried through the loop."""
    pid = tl.program_id(0)
    across = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * across)
    first = group * GROUP
    height = min(tl.cdiv(M, BLOCK_M) - first, GROUP)
    m = first + (pid % (GROUP * across)) % height
    n = (pid % (GROUP * across)) // height
    im = (m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    i_n = (n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    p = a + im[:, None] * stride_am + k[None, :] * stride_ak
    q = b + k[:, None] * stride_bk + i_n[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        x = tl.load(p, mask=k[None, :] < K - step * BLOCK_K, other=0.0)
        y = tl.load(q, mask=k[:, None] < K - step * BLOCK_K, other=0.0)
        total = tl.dot(x, y, total)
        p += BLOCK_K * stride_ak
        q += BLOCK_K * stride_bk
    if ACTIVATION == "leaky_relu":
        total = leaky_relu(total)
    im, i_n = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    out = c + stride_cm * im[:, None] + stride_cn * i_n[None, :]
    tl.store(out, total.to(c.dtype.element_ty), (im[:, None] < M) & (i_n[None, :] < N))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64, 64), (65, 40, 100), (1, 33, 7)])
@pytest.mark.parametrize("activation", ["", "leaky_relu"])
def test_matmul_in_groups(shape, dtype, activation):
    m, n, k = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).T
    c = torch.empty(m, n, dtype=dtype)
    grid = lambda given: (triton.cdiv(m, given["BLOCK_M"]) * triton.cdiv(n, given["BLOCK_N"]),)  # noqa: E731
    native.launch(
        matmul_kernel, grid, a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), BLOCK_M=32, BLOCK_N=16, BLOCK_K=32, GROUP=2, ACTIVATION=activation
    )  # fmt: skip
    expected = a.float() @ b.float()
    expected = F.leaky_relu(expected) if activation else expected
    torch.testing.assert_close(c, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@triton.jit
def dropout_kernel(x, out, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i, i < n)
    tl.store(out + i, tl.where(tl.rand(seed, i) > p, y / (1 - p), 0.0), i < n)


def test_dropout():
    x = torch.rand(4000) + 0.1
    first, second, other = torch.empty(4000), torch.empty(4000), torch.empty(4000)
    for out, seed, block in ((first, 123, 1024), (second, 123, 64), (other, 512, 1024)):
        native.launch(dropout_kernel, (triton.cdiv(4000, block),), x, out, 4000, 0.25, seed, BLOCK=block)
    assert torch.equal(first, second) and not torch.equal(first, other)
    kept = first != 0
    assert abs(kept.float().mean() - 0.75) < 0.03
    torch.testing.assert_close(first[kept], x[kept] / 0.75)


@triton.jit
def layer_norm_kernel(x, y, w, b, mean, rstd, stride, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x += row * stride
    y += row * stride
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + i, i < N, 0.0).to(tl.float32)
    m = tl.sum(total, axis=0) / N
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        d = tl.where(i < N, tl.load(x + i, i < N, 0.0).to(tl.float32) - m, 0.0)
        squares += d * d
    r = 1 / tl.sqrt(tl.sum(squares, axis=0) / N + eps)
    tl.store(mean + row, m)
    tl.store(rstd + row, r)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        normal = (tl.load(x + i, i < N, 0.0).to(tl.float32) - m) * r
        tl.store(y + i, normal * tl.load(w + i, i < N) + tl.load(b + i, i < N), i < N)


@triton.jit
def layer_norm_backward_kernel(
    dx, dy, dw, db, x, w, mean, rstd, locks, stride, N, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """dx, and sums for dw and db in `GROUP` rows, each under a lock."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < N
    x += row * stride
    dy += row * stride
    dx += row * stride
    group = row % GROUP
    lock = locks + group
    count = lock + GROUP
    dw = dw + group * N + i
    db = db + group * N + i
    g = tl.load(dy + i, inside, 0).to(tl.float32)
    r = tl.load(rstd + row)
    normal = tl.where(inside, (tl.load(x + i, inside, 0).to(tl.float32) - tl.load(mean + row)) * r, 0.0)
    wg = tl.where(inside, tl.load(w + i, inside).to(tl.float32) * g, 0.0)
    c1 = tl.sum(normal * wg, axis=0) / N
    c2 = tl.sum(wg, axis=0) / N
    tl.store(dx + i, (wg - (normal * c1 + c2)) * r, inside)
    partial_w = (g * normal).to(w.dtype.element_ty)
    partial_b = g.to(w.dtype.element_ty)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    if tl.load(count) == 0:
        tl.atomic_xchg(count, 1)
    else:
        partial_w += tl.load(dw, inside)
        partial_b += tl.load(db, inside)
    tl.store(dw, partial_w, inside)
    tl.store(db, partial_b, inside)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def layer_norm_sums_kernel(dw, db, out_w, out_b, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, M, BLOCK_M):
        rows = i + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        at = rows[:, None] * N + columns[None, :]
        sum_w += tl.load(dw + at, mask, 0.0)
        sum_b += tl.load(db + at, mask, 0.0)
    tl.store(out_w + columns, tl.sum(sum_w, axis=0), columns < N)
    tl.store(out_b + columns, tl.sum(sum_b, axis=0), columns < N)


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (37, 100)])
def test_layer_norm_forward_and_backward(rows, columns):
    x = torch.randn(rows, columns, requires_grad=True)
    w, b = torch.rand(columns, requires_grad=True), torch.rand(columns, requires_grad=True)
    dy = torch.randn(rows, columns)
    y, mean, rstd = torch.empty(rows, columns), torch.empty(rows), torch.empty(rows)
    native.launch(
        layer_norm_kernel, (rows,), x.detach(), y, w.detach(), b.detach(), mean, rstd, columns, columns, 1e-5, BLOCK=32
    )
    expected = F.layer_norm(x, (columns,), w, b, 1e-5)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward(dy)
    group = 4
    locks, partial_w, partial_b = (
        torch.zeros(2 * group, dtype=torch.int32),
        torch.zeros(group, columns),
        torch.zeros(group, columns),
    )
    dx, dw, db = torch.empty(rows, columns), torch.empty(columns), torch.empty(columns)
    native.launch(
        layer_norm_backward_kernel, (rows,), dx, dy, partial_w, partial_b, x.detach(), w.detach(), mean, rstd, locks, columns, columns, GROUP=group, BLOCK=128
    )  # fmt: skip
    native.launch(
        layer_norm_sums_kernel,
        (triton.cdiv(columns, 32),),
        partial_w,
        partial_b,
        dw,
        db,
        min(group, rows),
        columns,
        BLOCK_M=8,
        BLOCK_N=32,
    )
    for got, wanted in ((dx, x.grad), (dw, w.grad), (db, b.grad)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@triton.jit
def _attend(
    acc,
    total,
    most,
    q,
    k,
    v,
    stride,
    start,
    low,
    high,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
):
    rows = start + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    for n in range(low, high, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        scores = tl.dot(q, tl.load(k + columns[None, :] * stride + d[:, None]), input_precision="ieee")
        if CAUSAL:
            scores = tl.where(rows[:, None] >= columns[None, :], scores, -1.0e6)
        new = tl.maximum(most, tl.max(scores, 1))
        p = tl.math.exp2(scores - new[:, None])
        alpha = tl.math.exp2(most - new)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(
            p.to(q.dtype),
            tl.load(v + columns[:, None] * stride + d[None, :]),
            acc * alpha[:, None],
            input_precision="ieee",
        )
        most = new
    return acc, total, most


@triton.jit
def attention_kernel(
    q, k, v, out, logs, scale, heads, stride_b, stride_h, stride_n, n, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Flash attention: first the blocks below the diagonal, then those on it."""
    start = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    base = (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    q += base
    k += base
    v += base
    rows, d = start + tl.arange(0, BLOCK_M), tl.arange(0, D)
    x = (tl.load(q + rows[:, None] * stride_n + d[None, :]) * (scale * 1.44269504)).to(q.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    most = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    acc, total, most = _attend(
        acc, total, most, x, k, v, stride_n, start, 0, start if CAUSAL else n, False, BLOCK_M, BLOCK_N, D
    )
    if CAUSAL:
        acc, total, most = _attend(
            acc, total, most, x, k, v, stride_n, start, start, start + BLOCK_M, True, BLOCK_M, BLOCK_N, D
        )
    tl.store(logs + head * n + rows, most + tl.math.log2(total))
    tl.store(out + base + rows[:, None] * stride_n + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_flash_attention(causal, dtype):
    q, k, v = torch.randn(3, 2, 2, 128, 32).to(dtype)
    out, logs = torch.empty_like(q), torch.empty(4, 128)
    native.launch(
        attention_kernel, (4, 4), q, k, v, out, logs, 1 / math.sqrt(32), 2, *q.stride()[:3], 128, CAUSAL=causal, BLOCK_M=32, BLOCK_N=16, D=32
    )  # fmt: skip
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-3)
