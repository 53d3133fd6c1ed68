"""Flash attention, forward: softmax(scale * q k^T) v without the matrix of scores in memory.

    s_ij = scale * q_i . k_j        (softcap * tanh(s_ij / softcap) with a softcap)
    out_i = sum_j e^(s_ij - lse_i) v_j        lse_i = log sum_j e^(s_ij)

A program owns BLOCK_M queries of one head and walks over their keys in tiles of BLOCK_N, with a running maximum and sum
of the softmax and the output in float32. Grouped heads read the keys and values of their group where they lie. Only tiles
that a query sees are read, and only those on the border of what it sees are masked (`attention_common` has the geometry);
a boolean mask is read by its strides, in every tile.

4 * seq_q * seq_k * head_dim FLOPs a head, half of them if causal. The keys and values of a head are read once for every
BLOCK_M queries, mostly from L2: 128 queries do 128 FLOPs for each byte of them in bf16, so it is compute bound. Kept for
backward (`attention_backward`): q, k, v, out, and lse in float64: it makes e^(s - lse) again, of two numbers that may be large.

Papers: Dao et al., FlashAttention, 2022 (arXiv:2205.14135); Dao, FlashAttention-2, 2023 (arXiv:2307.08691).
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import attention_pytorch, flops
from .activation import tanh
from .attention_backward import attention_backward_op, plan_attention_backward
from .attention_common import (
    LARGEST_HEAD_DIM,
    LN2,
    LOG2E,
    NOT_SPECIALIZED,
    PATTERN_SCHEMA,
    Pattern,
    Tile,
    as_batch,
    block_d,
    count_tiles,
    empty_lse,
    empty_rows,
    fit_stages,
    key_tiles,
    load_rows,
    may_attend,
    plan_tiles,
    pytorch_is_faster_on_cpu,
    read_pattern,
    store_rows,
    tile_for,
    tile_of_queries,
    tile_start,
)
from .dot import dot
from .launch import Gpu, LaunchPlan, gpu_of, next_power_of_2
from .library import below_autograd, call, register, register_autocast, register_autograd
from .rows import accumulation_dtype
from .triton_compat import tl, triton
from .tuned import tuned_plan
from .validate import require_floating, require_int32, require_kernel_dtype, require_same_device, require_shape


@triton.jit
def attend(
    b_out, b_max, b_sum, b_q, p_k, p_v, p_mask, o_m, lo, a, b, hi, q_hi, k_hi, shift,
    k_stride_s, v_stride_s, mask_stride_m, mask_stride_n, scale, softcap, window,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    IN_SHARES: tl.constexpr, INPUT_PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds tiles of keys to each query's output, maximum (base 2) and sum: a <= j < b, or if MASKED the rest of lo..hi."""
    factor = scale * LOG2E if softcap is None else softcap * LOG2E
    o_row, o_d = tl.arange(0, BLOCK_N).to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
    p_k += o_row * k_stride_s + o_d
    p_v += o_row * v_stride_s + o_d
    for i in range(0, count_tiles(lo, a, b, hi, BLOCK_N, MASKED)):
        start = tile_start(i, lo, a, b, BLOCK_N, MASKED)
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = (o_n < k_hi)[:, None]
        b_k = load_rows(p_k + tl.cast(start, tl.int64) * k_stride_s, m_n, HEAD_DIM, BLOCK_D, MASKED)
        b_seeing_q = b_q
        if IN_SHARES and CAUSAL and MASKED:  # no products of queries that see none of these keys: the last rows
            m_seeing = (o_m + shift >= start)[:, None]
            b_seeing_q = tl.where(m_seeing, b_q, 0.0)
        b_s = dot(b_seeing_q, tl.trans(b_k), None, INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        if softcap is not None:
            b_s = tanh(b_s * (scale / softcap))
        if MASKED:
            m_s = may_attend(p_mask, o_m, o_n, mask_stride_m, mask_stride_n, q_hi, k_hi, shift, window, CAUSAL)
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_max_new = tl.maximum(b_max, tl.max(b_s, axis=1) * factor)  # base 2: the scale is folded into one multiply-add
        b_base = b_max_new
        if MASKED:  # a query that saw nothing yet: -inf - -inf would be NaN
            b_base = tl.where(b_max_new == float("-inf"), 0.0, b_max_new)
        b_decay = tl.exp2(b_max - b_base)
        b_p = tl.exp2(b_s * factor - b_base[:, None])
        if IN_SHARES and CAUSAL and MASKED:
            b_p = tl.where(m_seeing, b_p, 0.0)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_v = load_rows(p_v + tl.cast(start, tl.int64) * v_stride_s, m_n, HEAD_DIM, BLOCK_D, MASKED)
        b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], INPUT_PRECISION)
        b_max = b_max_new
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_mask, p_key_start, p_key_end, p_cu_q, p_cu_k,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    HEADS, SEQ_Q, SEQ_K, SEQUENCES, TILES, PAIRS, SECTION, scale, softcap, window,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_BLOCK: tl.constexpr, IN_SHARES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_lo, q_hi, k_lo, k_hi = tile_of_queries(
        p_key_start, p_key_end, p_cu_q, p_cu_k, HEADS, SEQ_Q, SEQ_K, SEQUENCES, TILES, PAIRS, SECTION,
        IN_SHARES, BLOCK_M,
    )  # fmt: skip
    if i_lo >= q_hi:
        return
    shift = k_hi - q_hi
    lo, a, b, hi = key_tiles(
        i_lo, tl.minimum(i_lo + BLOCK_M, q_hi), k_lo, k_hi, shift, window, p_mask, CAUSAL, BLOCK_N, MASKED_BLOCK
    )

    o_m, o_d = i_lo + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < q_hi
    if IN_SHARES:  # the last query, which sees most keys, in the first row
        o_m = tl.minimum(i_lo + BLOCK_M, q_hi) - 1 - tl.arange(0, BLOCK_M)
        m_m = o_m >= i_lo
    p_q += i_b * q_stride_b + i_h * q_stride_h
    p_k += i_b * k_stride_b + i_h // GROUP * k_stride_h
    p_v += i_b * v_stride_b + i_h // GROUP * v_stride_h
    if p_mask is not None:
        p_mask += i_b * mask_stride_b + i_h * mask_stride_h
    o_row = o_m.to(tl.int64)[:, None]
    b_q = load_rows(p_q + o_row * q_stride_s + o_d[None, :], m_m[:, None], HEAD_DIM, BLOCK_D, MASKED=True)

    b_out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if lo < a or b < hi:
        b_out, b_max, b_sum = attend(
            b_out, b_max, b_sum, b_q, p_k, p_v, p_mask, o_m, lo, a, b, hi, q_hi, k_hi, shift,
            k_stride_s, v_stride_s, mask_stride_m, mask_stride_n, scale, softcap, window,
            CAUSAL, HEAD_DIM, BLOCK_D, MASKED_BLOCK, IN_SHARES, INPUT_PRECISION, MASKED=True,
        )  # fmt: skip
    if a < b:
        b_out, b_max, b_sum = attend(
            b_out, b_max, b_sum, b_q, p_k, p_v, p_mask, o_m, lo, a, b, hi, q_hi, k_hi, shift,
            k_stride_s, v_stride_s, mask_stride_m, mask_stride_n, scale, softcap, window,
            CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_N, IN_SHARES, INPUT_PRECISION, MASKED=False,
        )  # fmt: skip

    # the sum is 0 only for a query that may attend to nothing, whose maximum is -inf: out = 0, lse = -inf
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out *= (1.0 / b_sum)[:, None]
    o_row = (i_b * SEQ_Q + o_row) * HEADS + i_h
    store_rows(p_out + o_row * HEAD_DIM + o_d[None, :], b_out, m_m[:, None], HEAD_DIM, BLOCK_D)
    b_lse = (b_max.to(tl.float64) + tl.log2(b_sum).to(tl.float64)) * LN2
    tl.store(p_lse + (i_b * HEADS + i_h) * SEQ_Q + o_m, b_lse, mask=m_m)


TILES = {
    "sm_80": (Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 2)),
    "sm_90": (Tile(128, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 32, 8, 3)),
    "sm_100": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
    "gfx942": (Tile(128, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
    "float32": (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 1)),
}
"""For head_dim up to 64, 128, 256: the largest that leave nothing in local memory in loops. On sm_90 three stages, because with two
the copies of a tile are issued only when the one before it is done, and then waited for."""


def plan_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern: Pattern, gpu: Gpu) -> LaunchPlan:
    """Forward, for `q, k, v` as `as_batch` makes them; `out` as `empty_rows` does, `lse` contiguous."""
    batch, heads, seq_q, head_dim = q.shape
    _, kv_heads, seq_k, _ = k.shape
    itemsize = q.element_size()
    tile = _tile(head_dim, itemsize, max(16, next_power_of_2(min(seq_q, 128))), gpu)
    if seq_q >= 128 and pattern.mask is None and pattern.softcap is None:
        size = (head_dim, next_power_of_2(seq_q), int(pattern.causal), int(pattern.window is not None))
        if tuned := tuned_plan("attention", gpu, q.dtype, size):
            tile = Tile(tuned["block_m"], tuned["block_n"], tuned["num_warps"], tuned["num_stages"])
    return plan_tiles(
        attention_kernel, q, k, v, pattern, dict(p_out=out, p_lse=lse),
        rows=seq_q, pairs=batch * heads, pair_bytes=2 * seq_k * head_dim * itemsize * kv_heads // heads,
        over_keys=True, tile=tile, gpu=gpu,
    )  # fmt: skip


@functools.cache
def _tile(head_dim: int, itemsize: int, block_m: int, gpu: Gpu) -> Tile:
    """The table's tile, or a lower one for fewer queries than it has rows."""
    tile = tile_for(TILES, head_dim, itemsize, gpu)
    if head_dim < block_d(head_dim):
        # the mask of its columns takes registers: with 128 keys 184 bytes spilled on sm_90
        tile = replace(tile, block_n=min(64, tile.block_n))
    if block_m < tile.block_m:
        num_warps = 4 if head_dim <= 128 else tile.num_warps
        tile = replace(tile, block_m=block_m, block_n=min(64, tile.block_n), num_warps=num_warps)
    return fit_stages(tile, head_dim, itemsize, tile.block_m, 2 * tile.block_n, gpu)


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for batch, heads, kv_heads, seq, head_dim in ((4, 32, 8, 4096, 64), (4, 32, 8, 8192, 128)):
        q = torch.empty(batch, seq, heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        k = torch.empty(batch, seq, kv_heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        lse = torch.empty(batch, heads, seq, dtype=torch.float64, device="meta")
        pattern = Pattern(None, None, None, None, None, True, None, head_dim**-0.5, None)
        shape = f"{batch}x{heads}/{kv_heads}x{seq}x{head_dim} causal"
        yield shape, plan_attention(q, k, k, q, lse, pattern, gpu)
        for plan in plan_attention_backward(q, None, q, k, k, q, lse, q, k, k, pattern, gpu):
            yield shape, plan
    yield f"{shape} window 4096", plan_attention(q, k, k, q, lse, pattern._replace(window=4096), gpu)


def _kernel(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    require_kernel_dtype(q=q)
    out, lse = _fake(q, k, v, *options)
    if q.numel():
        pattern = read_pattern(options)
        plan_attention(as_batch(q), as_batch(k), as_batch(v), out, lse, pattern, gpu_of(q.device)).launch()
    return out, lse


def _pytorch(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _require_one_dtype(q, k, v)
    return attention_pytorch.forward(q, k, v, Pattern(*options))


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _require_one_dtype(q, k, v)
    return empty_rows(q), empty_lse(q)


def _require_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Checked below autocast, which makes them agree."""
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"k and v must have q's dtype, {q.dtype}, got {k.dtype} and {v.dtype}")


attention_op = register(
    f"attention(Tensor q, Tensor k, Tensor v, {PATTERN_SCHEMA}) -> (Tensor out, Tensor lse)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.attention,
    pytorch_is_faster=lambda q, k, *_: pytorch_is_faster_on_cpu(q, k),
)  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = below_autograd(attention_op, q, k, v, *options)
        ctx.set_materialize_grads(False)
        tensors, ctx.options = options[:5], options[5:]
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = attention_backward_op(dout, dlse, q, k, v, out, lse, *tensors, *ctx.options)
        return *gradients, *(None for _ in (*tensors, *ctx.options))


register_autograd(attention_op, _Attention)
register_autocast(attention_op)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, mask: Tensor | None = None, key_start: Tensor | None = None,
    key_end: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, mask: Tensor | None = None, key_start: Tensor | None = None,
    key_end: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, mask: Tensor | None = None, key_start: Tensor | None = None,
    key_end: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Scaled dot-product attention: softmax(scale * q k^T) v, exact, without the matrix of scores in memory.

    The last query stands on the last key: query i has the position seq_k - seq_q + i. A query that may attend to nothing
    gives 0, an lse of -inf and no gradients. What several arguments restrict must be allowed by each of them.

    Args:
        q: (batch, heads, seq_q, head_dim), float16, bfloat16 or float32 (float64 on the CPU), head_dim up to 256. Any
            strides; rows that are not contiguous are copied. Or packed sequences: (heads, total_q, head_dim).
        k, v: (batch, kv_heads, seq_k, head_dim), of q's dtype, or (kv_heads, total_k, head_dim). Query head h reads the
            key head h // (heads // kv_heads).
        causal: attend only to keys up to the query's own position.
        scale: positive; head_dim ** -0.5 by default.
        window: attend only to keys closer than this: position - window < j < position + window. With `causal` these are
            the last `window` keys, as in transformers' `sliding_window`.
        softcap: positive; scores become softcap * tanh(score / softcap).
        mask: boolean, True where a query may attend to a key, broadcastable to (batch, heads, seq_q, seq_k). It is read
            by its strides, never copied.
        key_start, key_end: (batch,), int32. Row b has the keys key_start[b] <= j < key_end[b], and its last query stands
            on key key_end[b] - 1: for left padding, and for caches that are not full. Both are cut to 0..seq_k.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32, rising from 0: sequence s has the rows cu_seqlens[s] to
            cu_seqlens[s + 1], aligned at their ends as above. `cu_seqlens_k` is `cu_seqlens_q` if not given. Rows past
            the last sequence give 0. Their values are not checked.
        return_lse: return the log of the sum of e^score too.

    Returns:
        out, of q's shape and dtype, in memory as (batch, seq_q, heads, head_dim) or (total_q, heads, head_dim): what the
        projection after it wants. With `return_lse` the pair (out, lse): lse is (batch, heads, seq_q) or (heads,
        total_q), float32 (float64 for float64), natural logarithm, differentiable.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, or value does not fit, or packed sequences come with a mask or key ranges.

    Source: arXiv:2307.08691.
    """
    require_floating(q=q, k=k, v=v)
    require_same_device(
        q=q, k=k, v=v, mask=mask, key_start=key_start, key_end=key_end, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )  # fmt: skip
    is_packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_shapes(q, k, v, is_packed)
    if is_packed:
        _check_packed(
            q, k, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, mask, key_start, key_end
        )
        if cu_seqlens_k is cu_seqlens_q:
            cu_seqlens_k = None  # calls with one tensor in two places are not remembered on a CPU
    else:
        _check_restrictions(q, k, mask, key_start, key_end)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    out, lse = call(
        attention_op, q, k, v, mask, key_start, key_end, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap
    )
    return (out, lse.to(accumulation_dtype(q))) if return_lse else out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, is_packed: bool) -> None:
    q_shape, k_shape, ndim = q.shape, k.shape, 3 if is_packed else 4
    if len(q_shape) != ndim or len(k_shape) != ndim:
        name, shape = ("q", q_shape) if len(q_shape) != ndim else ("k", k_shape)
        layout = "(heads, total, head_dim) with cu_seqlens" if is_packed else "(batch, heads, seq, head_dim)"
        raise ValueError(f"{name} must be {layout}, got shape {tuple(shape)}")
    require_shape("v", v, k_shape)
    heads, head_dim, kv_heads = q_shape[-3], q_shape[-1], k_shape[-3]
    if k_shape[-1] != head_dim or (not is_packed and k_shape[0] != q_shape[0]):
        same = "head_dim" if is_packed else "batch and head_dim"
        raise ValueError(f"k must have q's {same}: q has shape {tuple(q_shape)}, k {tuple(k_shape)}")
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(f"the heads of q must be a positive multiple of those of k, got {heads} and {kv_heads}")
    if not 1 <= head_dim <= LARGEST_HEAD_DIM:
        raise ValueError(f"head_dim must be from 1 to {LARGEST_HEAD_DIM}, got {head_dim}")


def _check_packed(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    mask: Tensor | None, key_start: Tensor | None, key_end: Tensor | None,
) -> None:  # fmt: skip
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k needs cu_seqlens_q")
    for name, other in (("mask", mask), ("key_start", key_start), ("key_end", key_end)):
        if other is not None:
            raise ValueError(f"{name} does not go with packed sequences (cu_seqlens_q)")
    if cu_seqlens_k is cu_seqlens_q and k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have q's {q.shape[1]} rows unless cu_seqlens_k is given, got {k.shape[1]}")
    require_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.ndim != 1 or x.shape[0] == 0:
            raise ValueError(f"{name} must be (sequences + 1,), got shape {tuple(x.shape)}")
    require_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape)


def _check_restrictions(
    q: Tensor, k: Tensor, mask: Tensor | None, key_start: Tensor | None, key_end: Tensor | None
) -> None:
    require_int32(key_start=key_start, key_end=key_end)
    for name, x in (("key_start", key_start), ("key_end", key_end)):
        if x is not None:
            require_shape(name, x, q.shape[:1])
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    scores = (*q.shape[:3], k.shape[2])
    if mask.ndim > 4 or any(n not in (1, full) for n, full in zip(mask.shape[::-1], scores[::-1], strict=False)):
        raise ValueError(
            f"mask must broadcast to (batch, heads, seq_q, seq_k) = {scores}, got shape {tuple(mask.shape)}"
        )
