"""Attention over a KV cache: parity, lengths, paging, bits that depend on a row alone, errors, and what PyTorch asks of an op.

Every cache holds NaN wherever a row may not look, and block tables hold garbage beyond it.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.attention_decode import attention_decode_op, plan_attention_decode
from llama_fast.kernels.launch import CPU, gpu_of
from llama_fast.kernels.native.front_end import read_plan
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


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_case(
    lens, device, *, heads=4, kv_heads=2, head_dim=64, max_len=300, key_start=None, dtype=torch.float32, window=None
):
    """q, k_cache, v_cache, cache_lens, key_start."""
    q = torch.randn(len(lens), heads, 1, head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, len(lens), kv_heads, max_len, head_dim, device=device, dtype=dtype)
    for b, end in enumerate(lens):
        start = max(key_start[b] if key_start else 0, end - window if window else 0, 0)
        for cache in (k, v):
            cache[b, :, :start] = torch.nan
            cache[b, :, end:] = torch.nan
    return q, k, v, int32(lens, device), None if key_start is None else int32(key_start, device)


def paged(k, v, lens, page):
    """The caches in blocks of `page` keys in random order, and the block table."""
    batch, kv_heads, max_len, head_dim = k.shape
    blocks = -(-max_len // page)
    order = torch.randperm(batch * blocks, device=k.device).view(batch, blocks)
    caches = []
    for cache in (k, v):
        padded = F.pad(cache, (0, 0, 0, blocks * page - max_len), value=torch.nan)
        pages = torch.empty(batch * blocks, kv_heads, page, head_dim, device=k.device, dtype=k.dtype)
        pages[order] = padded.unflatten(2, (blocks, page)).transpose(1, 2)
        caches.append(pages)
    unused = torch.arange(blocks, device=k.device) * page >= lens[:, None]
    return *caches, order.int().masked_fill(unused, 2**31 - 1)


def sdpa(q, k, v, lens, key_start=None, window=None, scale=None, softcap=None):
    """PyTorch's own op on the keys of each row: the peer. With softcap, which it has not, what transformers' eager path does."""
    out = torch.zeros_like(q)
    for b, end in enumerate(lens.tolist()):
        start = max(0 if key_start is None else int(key_start[b]), end - window if window else 0, 0)
        if start >= end:
            continue
        keys, values = (x[b : b + 1, :, start:end].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        if softcap is None:
            out[b] = F.scaled_dot_product_attention(q[b : b + 1], keys, values, scale=scale)[0]
        else:
            logits = q[b : b + 1] @ keys.mT * (scale or q.shape[-1] ** -0.5)
            logits = torch.tanh(logits / softcap) * softcap
            out[b] = (logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ values)[0]
    return out


def assert_attention_decode(q, k, v, lens, key_start=None, page=None, **options):
    def ours(q, k, v):
        table = None
        if page is not None:
            k, v, table = paged(k, v, lens, page)
        return ops.attention_decode(q, k, v, lens, key_start=key_start, block_table=table, **options)

    assert_parity(
        ours,
        lambda q, k, v: sdpa(q, k, v, lens, key_start, **options),
        lambda q, k, v: reference.attention_decode(q, k, v, lens, key_start=key_start, **options),
        [q, k, v],
        gradients=False,
    )


@pytest.mark.parametrize("page", [None, 16, 48])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, page, device):
    assert_attention_decode(*random_case([0, 1, 63, 128, 129, 300], device, dtype=dtype), page=page)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1), (16, 2), (6, 2), (40, 1)])
def test_groups_of_query_heads(heads, kv_heads, device):
    assert_attention_decode(*random_case([77, 200], device, heads=heads, kv_heads=kv_heads, dtype=torch.float16))


@pytest.mark.parametrize("head_dim", [1, 7, 8, 12, 16, 33, 64, 80, 128, 255, 256])
def test_head_dims(head_dim, device):
    assert_attention_decode(*random_case([130, 31], device, head_dim=head_dim, dtype=torch.float16))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("size", [50.0, -50.0, 1000.0])
def test_large_scores(size, softcap, device):
    """Scores that float32 holds exactly, close to each other and far from 0, in several splits: nothing rounds but softmax.
    With a softcap of 30, beside its edge on either side."""
    q, k, v, lens, _ = random_case([300, 170, 5], device, head_dim=16)
    q, k = q.sign(), k.sign()
    q[..., 0], k[..., 0] = 4 * size, 1.0
    assert_attention_decode(q, k, v, lens, softcap=softcap)


def test_scores_all_over_the_place(device):
    q, k, v, lens, _ = random_case([300, 170, 5], device, head_dim=32)
    assert_attention_decode(50 * q, k, v, lens)


@pytest.mark.parametrize("window", [1, 64, 100, 10**10])
@pytest.mark.parametrize("key_start", [None, [0, 3, 200, 250, 0]])
def test_window_and_key_start(window, key_start, device):
    lens = [0, 1, 200, 300, 300]
    q, k, v, lens, key_start = random_case(lens, device, key_start=key_start, window=window)
    assert_attention_decode(q, k, v, lens, key_start, window=window, page=48 if window == 100 else None)


@pytest.mark.parametrize(("softcap", "spread"), [(50.0, 1.0), (2.0, 3.0)])
def test_softcap_and_scale(softcap, spread, device):
    q, k, v, lens, _ = random_case([5, 140], device)
    assert_attention_decode(spread * q, k, v, lens, softcap=softcap, scale=0.1)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_shape(device, data):
    lens = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=3))
    key_start = [data.draw(st.integers(0, 40)) for _ in lens]
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    head_dim, window = data.draw(st.integers(16, 80)), data.draw(st.none() | st.integers(1, 160))
    case = random_case(
        lens, device, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, max_len=150, key_start=key_start,
        window=window,
    )  # fmt: skip
    assert_attention_decode(*case, page=data.draw(st.none() | st.integers(1, 70)), window=window)


@triton_only
def test_more_splits_than_the_combine_adds_at_once(device):
    gpu = dataclasses.replace(gpu_of(device), multiprocessors=24)
    longest = 40 * (256 if gpu.is_cpu else 16)
    q, k, v, lens, _ = random_case([longest, longest - 140], device, kv_heads=1, head_dim=256, max_len=longest)

    def ours(q, k, v):
        out = torch.full_like(q, torch.nan)
        split, combine = plan_attention_decode(q, k, v, lens, out, scale=1 / 16, gpu=gpu)
        assert split.grid == (2 * 40,)
        assert combine.constants["BLOCK_S"] == 32
        split.launch()
        combine.launch()
        return out

    assert_parity(
        ours, lambda *a: sdpa(*a, lens), lambda *a: reference.attention_decode(*a, lens), [q, k, v], gradients=False
    )


@pytest.mark.parametrize("layout", ["keys before heads", "head_dim before keys", "every other head", "expanded q"])
def test_strides(layout, device):
    q, k, v, lens, _ = random_case([70, 300], device)
    if layout == "keys before heads":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif layout == "head_dim before keys":
        k = k.mT.contiguous().mT
    elif layout == "every other head":
        q, k, v = (
            q.repeat_interleave(2, 1)[:, ::2],
            k.repeat_interleave(2, 1)[:, ::2],
            v.repeat_interleave(2, 3)[..., ::2],
        )
    else:
        q, k, v = q[:1].expand(2, -1, -1, -1), k[1:].expand(2, -1, -1, -1), v[1:].expand(2, -1, -1, -1)
    assert_attention_decode(q, k, v, lens)
    assert torch.equal(
        ops.attention_decode(q, k, v, lens[:1].expand(2)), ops.attention_decode(q, k, v, lens[:1].repeat(2))
    )


@triton_only  # PyTorch's own op makes no such promise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_of_a_row_depend_on_that_row_alone(dtype, device):
    q, k, v, lens, key_start = random_case([300, 1, 0, 250, 60], device, key_start=[0, 0, 0, 5, 2], dtype=dtype)
    expected = ops.attention_decode(q, k, v, lens, key_start=key_start)
    for page in (48, 300):
        k_pages, v_pages, table = paged(k, v, lens, page)
        in_pages = ops.attention_decode(q, k_pages, v_pages, lens, key_start=key_start, block_table=table)
        assert torch.equal(in_pages, expected), f"paged by {page}"
    for b, end in enumerate(lens.tolist()):  # alone, and in a cache that is no longer than it must be
        row = slice(b, b + 1)
        alone = ops.attention_decode(q[row], k[row, :, :end], v[row, :, :end], lens[row], key_start=key_start[row])
        assert torch.equal(alone, expected[row]), f"row {b} alone"
    for window in (20, 130):  # the keys of a window are a row's keys
        windowed = ops.attention_decode(q, k, v, lens, window=window, key_start=key_start)
        shifted = ops.attention_decode(q, k, v, lens, key_start=key_start.maximum(lens - window))
        assert torch.equal(windowed, shifted), f"window {window}"


def test_a_row_without_keys_is_zero(device):
    q, k, v, lens, _ = random_case([0, 10], device)
    for start in ([0, 10], [7, 300], [2**31 - 1, 2**31 - 1]):
        assert not ops.attention_decode(q, k, v, lens, key_start=int32(start, device))[0].any()
    assert not ops.attention_decode(q, k[:, :, :0], v[:, :, :0], lens * 0).any()
    assert not ops.attention_decode(q, k, v, lens - 10)[0].any()
    assert not ops.attention_decode(q, k, v, int32([-(2**31), 0], device), window=7).any()
    assert ops.attention_decode(q[:0], k[:0], v[:0], lens[:0]).shape == (0, 4, 1, 64)


def test_lengths_and_starts_outside_of_the_cache(device):
    """A start before it is its beginning. A length past its end is an error where it is seen without waiting, or the end."""
    q, k, v, _, _ = random_case([300], device)
    expected = ops.attention_decode(q, k, v, int32([300], device))
    assert torch.equal(ops.attention_decode(q, k, v, int32([300], device), key_start=int32([-5], device)), expected)
    if device.type == "cuda":
        assert torch.equal(ops.attention_decode(q, k, v, int32([10**9], device)), expected)
        return
    with pytest.raises(ValueError, match="cache_lens must be at most 300, the keys that k_cache holds, got 301"):
        ops.attention_decode(q, k, v, int32([301], device))
    k, v, table = paged(k, v, int32([300], device), 64)
    with pytest.raises(ValueError, match="at most 320, the keys that block_table has room for, got 1000000000"):
        ops.attention_decode(q, k, v, int32([10**9], device), block_table=table)


def test_same_bits_every_run(device):
    q, k, v, lens, _ = random_case([300, 17], device)
    assert_same_bits(lambda: [ops.attention_decode(q, k, v, lens)])


@pytest.mark.parametrize("window", [None, 5])
def test_opcheck(window, device):
    q, k, v, lens, start = random_case([9, 70], device, max_len=70, key_start=[0, 3])
    torch.library.opcheck(
        attention_decode_op, (q, k.nan_to_num(), v.nan_to_num(), lens, start, None, 0.1, window, None)
    )
    k, v, table = paged(k.nan_to_num(), v.nan_to_num(), lens, 16)
    torch.library.opcheck(
        attention_decode_op, (q, k.nan_to_num(), v.nan_to_num(), lens, None, table, 0.1, window, 30.0)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    compiled = torch.compile(
        lambda q, k, v, lens: ops.attention_decode(q, k, v, lens, window=50) * 2, fullgraph=True, dynamic=dynamic
    )
    for lens in ([9, 70], [4, 0, 70]):
        q, k, v, lens, _ = random_case(lens, device, max_len=70)
        assert torch.equal(compiled(q, k, v, lens), ops.attention_decode(q, k, v, lens, window=50) * 2)


def test_autocast_casts_to_the_lower_dtype(device):
    q, k, v, lens, _ = random_case([9, 70], device, max_len=70)
    with torch.autocast(device.type, dtype=torch.float16):
        out = ops.attention_decode(q, k.half(), v.half(), lens)
    assert torch.equal(out, ops.attention_decode(q.half(), k.half(), v.half(), lens))


def test_a_gradient_is_refused(device):
    q, k, v, lens, _ = random_case([9, 70], device, max_len=70)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="attention_decode has no gradient"):
        ops.attention_decode(q, k, v, lens)
    with torch.no_grad():
        assert not ops.attention_decode(q, k, v, lens).requires_grad


@on_cpu
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"window": 7}])
def test_float64(options, device):
    q, k, v, lens, start = random_case([9, 0, 70], device, max_len=70, key_start=[2, 0, 0], dtype=torch.float64)
    expected = reference.attention_decode(q, k, v, lens, key_start=start, **options)
    torch.testing.assert_close(ops.attention_decode(q, k, v, lens, key_start=start, **options), expected)


@not_on_cpu
def test_triton_refuses_float64(device):
    q, k, v, lens, _ = random_case([9], device, dtype=torch.float64)
    with pytest.raises(TypeError, match="q is float64"):
        ops.attention_decode(q, k, v, lens)


def arguments(**changes):
    cache = torch.zeros(2, 2, 10, 16)
    lens = torch.ones(2, dtype=torch.int32)
    return dict(q=torch.zeros(2, 4, 1, 16), k_cache=cache, v_cache=cache, cache_lens=lens) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
        (dict(q=torch.zeros(2, 4, 1, 16).int()), TypeError, "q must be float16"),
        (
            dict(q=torch.zeros(2, 4, 2, 16)),
            ValueError,
            r"q must have shape \(batch, heads, 1, head_dim\), got \(2, 4, 2",
        ),
        (dict(q=torch.zeros(2, 4, 16)), ValueError, "q must have shape"),
        (dict(q=torch.zeros(2, 3, 1, 16)), ValueError, "kv_heads must divide q's 3 heads, got 2"),
        (dict(q=torch.zeros(2, 4, 1, 0)), ValueError, "head_dim must be from 1 to 256, got 0"),
        (dict(q=torch.zeros(2, 4, 1, 257)), ValueError, "head_dim must be from 1 to 256, got 257"),
        (
            dict(q=torch.zeros(3, 4, 1, 16)),
            ValueError,
            r"k_cache must have shape \(3, kv_heads, max_len, 16\), got \(2",
        ),
        (dict(k_cache=torch.zeros(2, 2, 10, 32)), ValueError, r"k_cache must have shape \(2, kv_heads, max_len, 16\)"),
        (
            dict(v_cache=torch.zeros(2, 2, 9, 16)),
            ValueError,
            r"v_cache must have shape \(2, 2, 10, 16\), got \(2, 2, 9",
        ),
        (dict(v_cache=torch.zeros(2, 2, 10, 16).half()), TypeError, "must have q's dtype, torch.float32, got"),
        (dict(cache_lens=torch.ones(2)), TypeError, "cache_lens must be int32, got torch.float32"),
        (dict(cache_lens=None), TypeError, "cache_lens must be a torch.Tensor, got NoneType"),
        (dict(block_table=[0]), TypeError, "block_table must be a torch.Tensor, got list"),
        (dict(cache_lens=[1, 1]), TypeError, "cache_lens must be a torch.Tensor, got list"),
        (dict(cache_lens=torch.ones(3).int()), ValueError, r"cache_lens must have shape \(2,\), got \(3,\)"),
        (dict(key_start=torch.ones(2).long()), TypeError, "key_start must be int32, got torch.int64"),
        (dict(key_start=torch.ones(2, 1).int()), ValueError, r"key_start must have shape \(2,\), got \(2, 1\)"),
        (dict(block_table=torch.ones(2, 1)), TypeError, "block_table must be int32"),
        (dict(block_table=torch.ones(3, 1).int()), ValueError, r"block_table must have shape \(2, max_blocks\), got"),
        (dict(cache_lens=torch.ones(2, device="meta").int()), ValueError, "cache_lens must be on q's device"),
        (dict(window=0), ValueError, "window must be at least 1, got 0"),
        (dict(softcap=0.0), ValueError, "softcap must be positive and finite, got 0.0"),
        (dict(softcap=float("nan")), ValueError, "softcap must be positive and finite, got nan"),
        (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (
            dict(
                k_cache=torch.zeros(3, 2, 0, 16), v_cache=torch.zeros(3, 2, 0, 16), block_table=torch.ones(2, 1).int()
            ),
            ValueError,
            r"k_cache's blocks must hold at least one key, got shape \(3, 2, 0, 16\)",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        ops.attention_decode(**arguments(**changes))


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    cache, lens = torch.empty(2, 2, 10, 16, device="meta"), torch.ones(2, dtype=torch.int32, device="meta")
    out = ops.attention_decode(torch.empty(4, 2, 1, 16, device="meta").transpose(0, 1), cache, cache, lens)
    assert out.shape == (2, 4, 1, 16)
    assert out.is_contiguous()


@compiles_kernels
def test_on_a_cpu_a_key_is_found_in_its_block_without_a_division():
    """Blocks of 2^n keys: a shift and an `and`. With signed divisions the cache was read at 0.7 of a contiguous one's speed."""
    q, cache = torch.empty(1, 12, 1, 64, device="meta"), torch.empty(8, 4, 16, 64, device="meta")
    lens, table = (torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((1,), (1, 8)))
    split = plan_attention_decode(q, cache, cache, lens, q, block_table=table, scale=1.0, gpu=CPU)[0]
    kinds = {op.kind for op in read_plan(split).ops() if op.results and op.result.shape}
    assert "arith.divui" in kinds and not kinds & {"arith.divsi", "arith.remsi"}


@not_interpreted
@on_cpu
def test_threads_share_the_heads_of_a_short_row():
    """A thread has a run of programs: with the splits of all heads one after the other, the first had all keys of up to 256."""
    q, k, v, lens, _ = random_case([100], "cpu", max_len=1024)  # 4 query heads on 2
    table = torch.arange(64, dtype=torch.int32)[None]
    pages = [x.unflatten(2, (64, 16))[0].transpose(0, 1) for x in (k, v)]
    split, combine = plan_attention_decode(
        q, *pages, lens, q.clone(), block_table=table, scale=1.0, gpu=dataclasses.replace(CPU, multiprocessors=2)
    )
    partial = split.arguments["p_out"].fill_(torch.nan)
    dataclasses.replace(split, grid=(split.grid[0] // 2,)).launch()
    of_heads = partial[: split.arguments["STATS"]].view(4, combine.arguments["splits"], 64)
    assert of_heads[:2, 0].isfinite().all() and of_heads[2:].isnan().all()
