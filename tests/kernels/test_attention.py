"""Attention, forward and backward: parity, what may be attended to, edges, errors, and what PyTorch asks of an op."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import native, ops
from llama_fast.kernels import attention_backward, attention_common, cpu, reference
from llama_fast.kernels.attention import attention_op, example_plans, plan_attention
from llama_fast.kernels.attention_backward import attention_backward_op, plan_attention_backward
from llama_fast.kernels.binary import inspect_plan
from llama_fast.kernels.launch import CPU, GPUS, INTERPRETED
from llama_fast.kernels.parity import relative_error
from llama_fast.kernels.triton_compat import tl, triton
from tests.parity import (
    DTYPES,
    assert_parity,
    assert_same_bits,
    compiles_kernels,
    not_interpreted,
    not_on_cpu,
    on_cpu,
    triton_only,
)


def inputs(device, batch, heads, kv_heads, seq_q, seq_k, head_dim, dtype=torch.float16):
    """q, k, v as a model has them: (batch, seq, heads, head_dim) in memory, in bfloat16 numbers that every dtype holds."""
    shapes = (batch, seq_q, heads, head_dim), (batch, seq_k, kv_heads, head_dim), (batch, seq_k, kv_heads, head_dim)
    return [torch.randn(shape).bfloat16().to(device, dtype).transpose(1, 2) for shape in shapes]


def packed_inputs(device, heads, kv_heads, total_q, total_k, head_dim, dtype=torch.float16):
    return [x[0] for x in inputs(device, 1, heads, kv_heads, total_q, total_k, head_dim, dtype)]


def int32(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def torch_attention(
    q, k, v, *, causal=True, scale=None, window=None, softcap=None, mask=None, key_start=None, key_end=None
):
    """PyTorch's own ops in the same dtype: the peer."""
    options = dict(causal=causal, window=window, mask=mask, key_start=key_start, key_end=key_end)
    out, lse = reference.attention(q, k, v, scale=scale, softcap=softcap, return_lse=True, **options)
    if softcap is None:
        allowed = reference.allowed_keys(q, k, **options)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
    return out, lse.float()


def torch_packed_attention(q, k, v, *, cu_seqlens_q, cu_seqlens_k=None, **options):
    """The peer, sequence by sequence."""
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], float("-inf"), device=q.device)
    for s in range(cu_seqlens_q.numel() - 1):
        rows, keys = slice(*cu_seqlens_q[s : s + 2].tolist()), slice(*cu_seqlens_k[s : s + 2].tolist())
        if rows.start < rows.stop and keys.start < keys.stop:
            one = torch_attention(q[None, :, rows], k[None, :, keys], v[None, :, keys], **options)
            out[:, rows], lse[:, rows] = one[0][0], one[1][0]
    return out, lse


def assert_attention(q, k, v, **options):
    """out, lse and their gradients for q, k and v."""
    assert_parity(
        lambda *tensors: ops.attention(*tensors, return_lse=True, **options),
        lambda *tensors: (torch_attention if q.ndim == 4 else torch_packed_attention)(*tensors, **options),
        lambda *tensors: reference.attention(*tensors, return_lse=True, **options),
        [q, k, v],
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4, 1, 100, 100, 64),  # four heads a key head
        (1, 2, 2, 37, 150, 80),  # a later chunk; head_dim is no power of two
        (1, 2, 1, 110, 70, 128),  # the first queries of a causal one see nothing
        (1, 1, 1, 40, 70, 256),
        (2, 4, 2, 5, 33, 16),
        (2, 1, 1, 1, 77, 20),
    ],
)
def test_matches_the_reference(shape, dtype, causal, device):
    assert_attention(*inputs(device, *shape, dtype), causal=causal)


@pytest.mark.parametrize("seq", [1, 63, 65, 127, 129, 200])
def test_lengths_around_a_tile(seq, device):
    assert_attention(*inputs(device, 1, 2, 1, seq, seq, 32))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "seq_q", "seq_k"), [(1, 70, 70), (20, 150, 200), (100, 200, 150), (500, 60, 60)])
def test_window(window, seq_q, seq_k, causal, device):
    assert_attention(*inputs(device, 1, 2, 1, seq_q, seq_k, 16), window=window, causal=causal)


def test_window_is_as_in_transformers(device):
    """With window = 3 query i sees the keys i - 2, i - 1, i, and without `causal` also i + 1, i + 2."""
    q = torch.zeros(1, 1, 8, 16, device=device)
    v = torch.eye(8, 16, device=device)[None, None]
    seen = ops.attention(q, q, v, window=3)[0, 0, :, :8] > 0
    assert torch.equal(seen, torch.ones(8, 8, dtype=torch.bool, device=device).tril().triu(-2))
    seen = ops.attention(q, q, v, window=3, causal=False)[0, 0, :, :8] > 0
    assert torch.equal(seen, torch.ones(8, 8, dtype=torch.bool, device=device).tril(2).triu(-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, dtype, device):
    assert_attention(*inputs(device, 1, 2, 1, 70, 90, 32, dtype), softcap=softcap)


def test_scale(device):
    assert_attention(*inputs(device, 1, 2, 1, 40, 40, 16), scale=0.7)


@pytest.mark.parametrize(
    "shape",
    [(50, 70), (70,), (2, 1, 1, 70), (2, 1, 50, 70), (1, 4, 50, 70), (2, 4, 50, 70), (2, 4, 50, 1), (1, 1, 1, 1)],
)
def test_mask(shape, device):
    mask = torch.rand(shape, device=device) > 0.4
    if mask.numel() == 1:
        mask = torch.ones_like(mask)
    if shape[-2:] == (50, 70):
        mask[..., 7, :] = False  # a query that may attend to nothing
    assert_attention(*inputs(device, 2, 4, 2, 50, 70, 16), mask=mask, causal=len(shape) == 2)


def test_mask_is_read_by_its_strides(device):
    mask = (torch.rand(70, 50, 2, device=device) > 0.4).permute(2, 1, 0).unsqueeze(1)  # (2, 1, 50, 70), keys outermost
    assert_attention(*inputs(device, 2, 2, 1, 50, 70, 16), mask=mask, causal=False)


def test_a_mask_that_allows_all_changes_nothing(device):
    q, k, v = inputs(device, 1, 2, 1, 90, 90, 32)
    mask = torch.ones(90, 90, dtype=torch.bool, device=device)
    torch.testing.assert_close(ops.attention(q, k, v, mask=mask), ops.attention(q, k, v), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        ((0, 50, 80, 10), None),  # left padding
        (None, (90, 33, 0, 60)),  # a cache that is not full
        ((5, 70, 20, 90), (64, 90, 20, 30)),  # both, two of them empty
        ((-(2**31), 2**31 - 1, 0, 30), (2**31 - 1, 90, -(2**31), -7)),  # cut to the keys that there are
    ],
)
def test_key_ranges(start, end, causal, device):
    ranges = {name: int32(device, *x) for name, x in (("key_start", start), ("key_end", end)) if x is not None}
    assert_attention(*inputs(device, 4, 2, 1, 40, 90, 16), causal=causal, **ranges)


def test_lse_of_a_query_without_keys_passes_no_nan_on(device):
    """Two parts merged by logaddexp: the gradient of logaddexp(-inf, -inf) is NaN."""
    leaves = [x.requires_grad_() for x in inputs(device, 1, 2, 1, 30, 30, 16, torch.float32)]
    _, lse = ops.attention(*leaves, key_start=int32(device, 13), return_lse=True)
    merged = torch.logaddexp(lse, lse)
    assert torch.equal(merged.isinf(), torch.arange(30, device=device).lt(13).expand(1, 2, 30))
    expected = torch.autograd.grad(lse[..., 13:].sum(), leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(merged.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 25])
def test_keys_out_of_range_are_never_read(window, device):
    q, k, v = inputs(device, 2, 2, 1, 30, 100, 16, torch.float32)
    ranges = dict(key_start=int32(device, 0, 41), key_end=int32(device, 77, 90))
    outside = torch.ones(2, 1, 100, 1, dtype=torch.bool, device=device)
    outside[0, :, :77], outside[1, :, 41:90] = False, False

    def run(value):
        leaves = [q.clone(), k.masked_fill(outside, value), v.masked_fill(outside, value)]
        for leaf in leaves:
            leaf.requires_grad_()
        out = ops.attention(*leaves, window=window, **ranges)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for clean, poisoned in zip(run(0.0), run(float("nan")), strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ((33, 0, 1, 70, 5), None),  # an empty one, and one of one token
        ((30, 1, 0, 40), (20, 50, 7, 0)),  # other lengths of keys; queries without keys, keys without queries
    ],
)
def test_packed_sequences(lengths_q, lengths_k, causal, device):
    ends = [int32(device, 0, *torch.tensor(x).cumsum(0)) for x in (lengths_q, lengths_k) if x is not None]
    totals = int(ends[0][-1]), int(ends[-1][-1])
    cu_seqlens = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), ends, strict=False))
    window = None if lengths_k is None else 20
    assert_attention(*packed_inputs(device, 2, 1, *totals, 16), causal=causal, window=window, **cu_seqlens)


def test_more_packed_sequences_than_are_looked_up_at_once(device):
    q, k, v = packed_inputs(device, 1, 1, 150, 150, 16)
    cu_seqlens = torch.arange(151, dtype=torch.int32, device=device)
    assert torch.equal(ops.attention(q, k, v, cu_seqlens_q=cu_seqlens), v)  # one token each


def test_rows_past_the_last_packed_sequence(device):
    """As in a buffer of a fixed size: they give 0 and get no gradient."""
    assert_attention(
        *packed_inputs(device, 2, 1, 50, 60, 16),
        cu_seqlens_q=int32(device, 0, 10, 23),
        cu_seqlens_k=int32(device, 0, 30, 43),
    )


def test_packed_is_padded_without_padding(device):
    q, k, v = inputs(device, 1, 4, 2, 60, 60, 32)
    both = ops.attention(q[0], k[0], v[0], cu_seqlens_q=int32(device, 0, 25, 60))
    for rows in (slice(0, 25), slice(25, 60)):
        torch.testing.assert_close(
            both[None, :, rows], ops.attention(q[:, :, rows], k[:, :, rows], v[:, :, rows]), rtol=1e-3, atol=1e-3
        )


def test_each_head_reads_its_own_keys(device):
    """v of head h is h everywhere, so out of query head h is h // group exactly."""
    q, k, _ = inputs(device, 2, 6, 3, 20, 40, 16)
    v = torch.arange(6.0, device=device).half().view(2, 3, 1, 1).expand(2, 3, 40, 16)
    expected = torch.arange(6.0, device=device).half().view(2, 3, 1).repeat_interleave(2, 1).view(2, 6, 1, 1)
    assert torch.equal(ops.attention(q, k, v), expected.expand(2, 6, 20, 16))


@pytest.mark.parametrize(
    "layout", ["contiguous heads", "parts of one projection", "transposed rows", "one key head for all"]
)
def test_strides(layout, device):
    q, k, v = inputs(device, 2, 4, 4, 40, 40, 16)
    if layout == "contiguous heads":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    elif layout == "parts of one projection":
        q, k, v = torch.randn(2, 40, 3, 4, 16, device=device).half().permute(2, 0, 3, 1, 4)
    elif layout == "transposed rows":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    else:
        k, v = (x[:, :1].expand(2, 4, 40, 16) for x in (k, v))
    assert_attention(q, k, v)


@not_interpreted
def test_upstream_gradients_of_any_strides(device):
    q, k, v = (x.requires_grad_() for x in inputs(device, 1, 2, 1, 30, 30, 16, torch.float32))
    out = ops.attention(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)  # stride 0 everywhere
    for a, b in zip(grads, torch.autograd.grad(out, (q, k, v), torch.ones_like(out).mT.contiguous().mT), strict=True):
        torch.testing.assert_close(a, b)


@settings(
    max_examples=15 if INTERPRETED else 60 if cpu.chosen() == "pytorch" else 8, deadline=None
)  # natively each compiles
@given(data=st.data())
def test_any_combination(device, data):
    """With at least five keys for the last query: with one, dout . v - delta is 0 and its gradient nothing but rounding.
    And with a hundred numbers or more in each gradient: the error of one or two is a matter of luck."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, kv_heads, group, head_dim = draw(1, 2), draw(1, 2), draw(1, 3), draw(13, 16, 48, 72)
    seq_q, seq_k = data.draw(st.integers(8, 80)), data.draw(st.integers(20, 100))
    options = dict(causal=draw(True, False), window=draw(None, 5, 40), softcap=draw(None, 2.0))
    for name, smallest, largest in (("key_start", 0, seq_k // 4), ("key_end", seq_k // 2, seq_k)):
        if draw(True, False):
            bounds = st.lists(st.integers(smallest, largest), min_size=batch, max_size=batch)
            options[name] = int32(device, *data.draw(bounds))
    if draw(True, False):
        options["mask"] = (
            torch.rand(draw(1, batch), draw(1, kv_heads * group), draw(1, seq_q), seq_k, device=device) > 0.2
        )
    dtype = torch.float16 if INTERPRETED else torch.float32  # float32 has four times as many tiles to interpret
    assert_attention(*inputs(device, batch, kv_heads * group, kv_heads, seq_q, seq_k, head_dim, dtype), **options)


@pytest.mark.parametrize("options", [{}, {"softcap": 50.0}, {"window": 9}], ids=str)
@pytest.mark.parametrize(("scores", "size", "head_dim"), [("large", 50, 16), ("large", 100, 32), ("near ties", 50, 16)])
def test_large_scores(scores, size, head_dim, options, device):
    """Scores of hundreds, all over the place or one beside the other: e^(s - lse) of two large numbers. Where they lie apart
    few rows have an error at all, so there are 448: those of 50 are a matter of luck."""
    q, k, v = inputs(device, 8, 2, 1, 28, 17, head_dim, torch.float32)
    if scores == "near ties":
        k = (k[:, :, :1] + 0.002 * k).bfloat16().float()
    assert_attention(size * q, k, v, **options)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores(size, device):
    """All weight on one key, or on equal ones: no overflow, no NaN."""
    q, k, v = inputs(device, 1, 1, 1, 40, 40, 16, torch.float32)
    q[..., 0], k[..., 0] = size, torch.arange(40.0, device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = ops.attention(*leaves, return_lse=True)
    best = torch.arange(40, device=device) if size > 0 else torch.zeros(40, dtype=torch.int64, device=device)
    assert relative_error(out, v[:, :, best]) < 1e-6
    assert lse.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize(("batch", "seq_q", "seq_k"), [(0, 4, 4), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty(batch, seq_q, seq_k, device):
    leaves = [x.requires_grad_() for x in inputs(device, batch, 2, 1, seq_q, seq_k, 16)]
    out, lse = ops.attention(*leaves, return_lse=True)
    assert out.shape == leaves[0].shape
    assert not out.any()
    assert torch.equal(lse, torch.full((batch, 2, seq_q), float("-inf"), device=device))
    gradients = torch.autograd.grad(out.sum() + lse.exp().sum(), leaves)
    assert not any(gradient.any() for gradient in gradients)


def test_empty_packed(device):
    q, k, v = packed_inputs(device, 2, 1, 0, 0, 16)
    assert ops.attention(q, k, v, cu_seqlens_q=int32(device, 0, 0, 0)).shape == (2, 0, 16)
    assert ops.attention(q, k, v, cu_seqlens_q=int32(device, 0)).shape == (2, 0, 16)


def test_rows_further_apart_than_an_int32_counts(device):
    """The last row starts 17 * 2^27 > 2^31 elements into k. Only what is touched of the 4.8 GB is ever in memory."""
    storage = torch.UntypedStorage(18 * 2**27 * 2, device=device)
    k = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (1, 1, 18, 16), (0, 0, 2**27, 1))
    k.copy_(torch.randn(k.shape))
    q, _, v = inputs(device, 1, 1, 1, 18, 18, 16)
    for near, far in zip(_with_gradients(q, k.contiguous(), v), _with_gradients(q, k, v), strict=True):
        assert torch.equal(near, far)
    for near, far in zip(_with_gradients(k.contiguous(), v, v), _with_gradients(k, v, v), strict=True):
        assert torch.equal(near, far)


def _with_gradients(*tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = ops.attention(*leaves)
    return out, *torch.autograd.grad(out.sum(), leaves)


def test_memory_of_the_output_is_what_the_projection_reads(device):
    q, k, v = inputs(device, 2, 4, 2, 9, 9, 16)
    assert ops.attention(q.contiguous(), k, v).transpose(1, 2).is_contiguous()
    out, lse = ops.attention(q[0], k[0], v[0], cu_seqlens_q=int32(device, 0, 9), return_lse=True)
    assert out.transpose(0, 1).is_contiguous()
    assert lse.shape == (4, 9)
    assert lse.dtype == torch.float32


def test_only_what_needs_a_gradient_gets_one(device):
    q, k, v = inputs(device, 1, 2, 1, 9, 9, 16)
    v.requires_grad_()
    ops.attention(q, k, v).sum().backward()
    assert v.grad is not None
    assert q.grad is None


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="plans of CPUs")
@pytest.mark.parametrize(("cores", "kernels"), [(1, 1), (64, 2)])
def test_backward_where_key_heads_are_enough_for_the_cores_and_where_not(cores, kernels, device, monkeypatch):
    """One kernel that makes dq, dk and dv, or two: whichever this machine has by itself. Calls are remembered by their shapes."""
    gpu, seq = replace(CPU, multiprocessors=cores), 150 + cores
    monkeypatch.setattr(attention_backward, "gpu_of", lambda _: gpu)
    q, k, v = inputs(device, 2, 4, 2, seq, seq + 40, 48, torch.float32)
    pattern = attention_common.Pattern(None, None, None, None, None, True, None, 0.1, None)
    assert len(plan_attention_backward(q, None, q, k, v, q, q[..., 0].double(), q, k, v, pattern, gpu)) == kernels
    assert_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert_attention(q, k, v, window=60, softcap=5.0, mask=torch.rand(seq, seq + 40, device=device) < 0.5)
    assert_attention(q, k, v, key_start=int32(device, 0, 41), key_end=int32(device, seq, seq + 7))
    q, k, v = packed_inputs(device, 4, 2, seq, seq, 48, torch.float32)
    assert_attention(q, k, v, cu_seqlens_q=int32(device, 0, 3, 140, 145), cu_seqlens_k=int32(device, 0, 9, 9, 150))


@triton_only
def test_order_of_programs(device, monkeypatch):
    """In sections of four of the six pairs of batch row and head, as for longer sequences."""
    tensors = inputs(device, 3, 2, 1, 150, 150, 16)
    whole = _with_gradients(*tensors)
    monkeypatch.setattr(attention_common, "SECTION_BYTES", 4 * 150 * 16 * 2)
    for a, b in zip(whole, _with_gradients(*tensors), strict=True):
        assert torch.equal(a, b)


@triton.jit
def tiles_kernel(p_tile, p_pair, TILES, PAIRS, SECTION, IN_SHARES: tl.constexpr):
    i_tile, i_pair = attention_common.next_tile(TILES, PAIRS, SECTION, IN_SHARES)
    tl.store(p_tile + tl.program_id(0), i_tile)
    tl.store(p_pair + tl.program_id(0), i_pair)


@pytest.mark.skipif(native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}")
@pytest.mark.parametrize(("tiles", "pairs", "threads"), [(16, 12, 2), (16, 1, 4), (7, 3, 2), (1, 5, 2), (16, 12, 8)])
def test_threads_have_as_much_to_do(tiles, pairs, threads):
    """Where tile i of a causal sequence takes i + 1 steps, and threads take the programs in shares, one after the other."""
    i_tile, i_pair = (torch.full((tiles * pairs,), -1, dtype=torch.int32) for _ in range(2))
    native.launch(tiles_kernel, (tiles * pairs,), i_tile, i_pair, tiles, pairs, 1, IN_SHARES=True)
    assert sorted(zip(i_tile.tolist(), i_pair.tolist(), strict=True)) == [
        (t, p) for t in range(tiles) for p in range(pairs)
    ]
    ends = [tiles * pairs * thread // threads for thread in range(threads + 1)]
    steps = [int((i_tile[begin:end] + 1).sum()) for begin, end in itertools.pairwise(ends)]
    assert max(steps) <= sum(steps) / threads + tiles  # by no more than a long tile


def test_same_bits_every_run(device):
    q, k, v = inputs(device, 1, 4, 1, 140, 140, 32)
    assert_same_bits(lambda: _with_gradients(q, k, v))


@compiles_kernels
def test_products_are_not_waited_for_one_by_one():
    """On sm_90 the HGMMAs of a product run back to back: two waits at most in each of the two loops, and one behind it."""
    for shape, plan in example_plans(GPUS["sm_90"]):
        sass = plan.compile(GPUS["sm_90"]).asm["sass"]
        assert sass.count("HGMMA") >= 20, f"{plan.kernel.__name__} {shape}"
        assert sass.count("WARPGROUP.DEPBAR") <= 6, f"{plan.kernel.__name__} {shape}"


@compiles_kernels
def test_loops_stay_out_of_local_memory():
    """Where the examples do not look: a head_dim that is no power of two, and key ranges in the backward pass."""
    gpu, meta = GPUS["sm_90"], torch.device("meta")
    plain = attention_common.Pattern(None, None, None, None, None, True, None, 0.1, None)
    ranges = torch.empty(2, dtype=torch.int32, device=meta)
    q, k, v = (x.bfloat16() for x in inputs(meta, 2, 8, 2, 4096, 4096, 96))
    forward = plan_attention(q, k, v, q, q[..., 0].float(), plain, gpu)
    q, k, v = (x.bfloat16() for x in inputs(meta, 2, 8, 2, 4096, 4096, 128))
    padded = plain._replace(key_start=ranges, key_end=ranges)
    _, dk_dv = plan_attention_backward(q, None, q, k, v, q, q[..., 0].float(), q, k, v, padded, gpu)
    assert inspect_plan(forward, gpu).spill_bytes == 0
    assert inspect_plan(dk_dv, gpu).local_accesses_in_loops == 0


PATTERNS = {
    "causal": (None, None, None, None, None, True, None, 0.25, None),
    "window, softcap": (None, None, None, None, None, False, 5, 0.25, 2.0),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_opcheck(pattern, requires_grad, device):
    tensors = [x.requires_grad_(requires_grad) for x in inputs(device, 2, 2, 1, 5, 9, 16, torch.float32)]
    torch.library.opcheck(attention_op, (*tensors, *PATTERNS[pattern]))


def test_opcheck_of_the_restrictions_and_of_backward(device):
    q, k, v = inputs(device, 2, 2, 1, 5, 9, 16, torch.float32)
    mask = torch.rand(2, 1, 5, 9, device=device) > 0.3
    ranges = int32(device, 0, 2), int32(device, 9, 7)
    options = (mask, *ranges, None, None, True, None, 0.25, None)
    torch.library.opcheck(attention_op, (q, k, v, *options))
    out, lse = attention_op(q, k, v, *options)
    torch.library.opcheck(attention_backward_op, (out, torch.ones_like(lse), q, k, v, out, lse, *options))
    packed = (None, None, None, int32(device, 0, 2, 5), int32(device, 0, 4, 9), True, None, 0.25, None)
    torch.library.opcheck(attention_op, (q[0].requires_grad_(), k[0], v[0], *packed))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    def function(q, k, v, key_start):
        return ops.attention(q, k, v, window=6, key_start=key_start, return_lse=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for seq in (7, 12):
        tensors = inputs(device, 2, 2, 1, seq, seq, 16, torch.float32)
        eager, traced = [], []
        for run, found in ((function, eager), (compiled, traced)):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out, lse = run(*leaves, int32(device, 0, 2))
            found += [out, lse, *torch.autograd.grad(out.square().sum() + lse[:, :, 2:].sum(), leaves)]
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_makes_the_dtypes_agree(dtype, device):
    q, k, v = inputs(device, 1, 2, 1, 9, 9, 16, torch.float32)
    q.requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        out = ops.attention(q, k.to(dtype), v)
    assert out.dtype == dtype
    assert torch.equal(out, ops.attention(q.to(dtype), k.to(dtype), v.to(dtype)))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@on_cpu
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=False, softcap=1.5),
        dict(window=3, softcap=1.5, return_lse=True),
        dict(key_start=torch.tensor([0, 4], dtype=torch.int32), return_lse=True),
        dict(mask=torch.tensor([True, False, True, True, True, False]), causal=False),
    ],
    ids=str,
)
def test_gradcheck(options):
    q, k, v = (x.requires_grad_() for x in inputs("cpu", 2, 4, 2, 4, 6, 4, torch.float64))
    if "key_start" in options:  # gradcheck cannot take differences of -inf
        function = lambda *tensors: tuple(x.masked_fill(x.isinf(), 0) for x in ops.attention(*tensors, **options))  # noqa: E731
    else:
        function = lambda *tensors: ops.attention(*tensors, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v))


@on_cpu
def test_gradcheck_packed():
    q, k, v = (x.requires_grad_() for x in packed_inputs("cpu", 2, 1, 6, 6, 4, torch.float64))
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *tensors: ops.attention(*tensors, cu_seqlens_q=cu_seqlens), (q, k, v))


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="q is float64"):
        ops.attention(*inputs(device, 1, 1, 1, 4, 4, 16, torch.float64))


def _bad(q=(2, 4, 5, 16), k=(2, 2, 7, 16), **options):
    v = options.pop("v", None)
    q, k = (torch.ones(x) if isinstance(x, tuple) else x for x in (q, k))
    return dict(q=q, k=k, v=k if v is None else v, **options)


ROW_BOUNDS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(mask=[True]), TypeError, "mask must be a torch.Tensor, got list"),
        (_bad(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
        (_bad(q=torch.ones(2, 4, 5, 16, dtype=torch.int64)), TypeError, "q must be float16"),
        (
            _bad(q=torch.ones(2, 4, 5, 16).half()),
            TypeError,
            "k and v must have q's dtype, torch.float16, got torch.float32",
        ),
        (_bad(k=torch.ones(2, 2, 7, 16, device="meta")), ValueError, "k must be on q's device"),
        (_bad(q=(4, 5, 16)), ValueError, r"q must be \(batch, heads, seq, head_dim\), got shape \(4, 5, 16\)"),
        (_bad(v=torch.ones(2, 2, 8, 16)), ValueError, r"v must have shape \(2, 2, 7, 16\), got \(2, 2, 8, 16\)"),
        (_bad(k=(1, 2, 7, 16)), ValueError, "k must have q's batch and head_dim"),
        (_bad(k=(2, 2, 7, 8)), ValueError, "k must have q's batch and head_dim"),
        (_bad(k=(2, 3, 7, 16)), ValueError, "must be a positive multiple of those of k, got 4 and 3"),
        (_bad(q=(2, 0, 5, 16)), ValueError, "must be a positive multiple of those of k, got 0 and 2"),
        (_bad(q=(2, 4, 5, 258), k=(2, 2, 7, 258)), ValueError, "head_dim must be from 1 to 256, got 258"),
        (_bad(scale=0.0), ValueError, "scale must be positive and finite, got 0.0"),
        (_bad(softcap=-1.0), ValueError, "softcap must be positive and finite, got -1.0"),
        (_bad(window=0), ValueError, "window must be at least 1, got 0"),
        (_bad(mask=torch.ones(5, 7)), TypeError, "mask must be boolean, got torch.float32"),
        (
            _bad(mask=torch.ones(7, 5, dtype=torch.bool)),
            ValueError,
            r"mask must broadcast to .*\(2, 4, 5, 7\), got shape \(7, 5\)",
        ),
        (_bad(key_start=torch.zeros(2)), TypeError, "key_start must be int32, got torch.float32"),
        (_bad(key_end=torch.zeros(3, dtype=torch.int32)), ValueError, r"key_end must have shape \(2,\), got \(3,\)"),
        (_bad(cu_seqlens_q=ROW_BOUNDS), ValueError, r"q must be \(heads, total, head_dim\) with cu_seqlens"),
        (_bad((4, 5, 16), (2, 7, 16), cu_seqlens_k=ROW_BOUNDS), ValueError, "cu_seqlens_k needs cu_seqlens_q"),
        (_bad((4, 5, 16), (2, 7, 16), cu_seqlens_q=ROW_BOUNDS), ValueError, "k must have q's 5 rows"),
        (_bad((4, 5, 16), (2, 5, 8), cu_seqlens_q=ROW_BOUNDS), ValueError, "k must have q's head_dim"),
        (_bad((4, 5, 16), (2, 5, 16), cu_seqlens_q=ROW_BOUNDS.long()), TypeError, "cu_seqlens_q must be int32"),
        (
            _bad((4, 5, 16), (2, 5, 16), cu_seqlens_q=ROW_BOUNDS[None]),
            ValueError,
            r"cu_seqlens_q must be \(sequences \+ 1,\)",
        ),
        (
            _bad((4, 5, 16), (2, 5, 16), cu_seqlens_q=ROW_BOUNDS, cu_seqlens_k=ROW_BOUNDS[:1]),
            ValueError,
            r"cu_seqlens_k must have shape \(2,\), got \(1,\)",
        ),
        (
            _bad((4, 5, 16), (2, 5, 16), cu_seqlens_q=ROW_BOUNDS, key_start=ROW_BOUNDS),
            ValueError,
            "key_start does not go with packed sequences",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.attention(**arguments)
