"""Flash attention, backward: dq, dk and dv without the matrix of scores, in a fixed order, without atomics.

With p_ij = e^(s_ij - lse_i) computed again and delta_i = sum_d dout_id * out_id - dlse_i:

    dv_j = sum_i p_ij dout_i        ds_ij = p_ij * (dout_i . v_j - delta_i)        (times 1 - tanh^2 with a softcap)
    dq_i = scale * sum_j ds_ij k_j        dk_j = scale * sum_i ds_ij q_i

Two kernels, in this order. For dq a program owns BLOCK_M queries of one head, computes their delta (and keeps it for the
second kernel) and walks over their keys. For dk and dv a program owns BLOCK_N keys of one key head and walks over the
queries of all heads of its group, so that the sum over the group is made in its registers, in float32. Both walk as the
forward kernel does (`attention_common`). Scores are computed twice: 14 * seq_q * seq_k * head_dim FLOPs a head, half of
them if causal, against 10 for one kernel that adds up dq with atomics in no fixed order. lse comes in float64; of its two
float32 parts the smaller one counts where products are float32, and is left out where they are not.

Paper: Dao, FlashAttention-2, 2023 (arXiv:2307.08691).
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import attention_pytorch, flops
from .activation import tanh
from .attention_common import (
    LOG2E,
    NOT_SPECIALIZED,
    PATTERN_SCHEMA,
    Pattern,
    Tile,
    as_batch,
    as_empty_rows,
    count_tiles,
    empty_rows,
    fit_stages,
    key_tiles,
    load_mask,
    load_rows,
    may_attend,
    next_tile,
    plan_tiles,
    pytorch_is_faster_on_cpu,
    query_tiles,
    read_pattern,
    sequence_bounds,
    sequence_of_tile,
    store_rows,
    tile_for,
    tile_of_queries,
    tile_start,
    visible,
)
from .dot import dot
from .launch import Gpu, LaunchPlan, gpu_of
from .library import register
from .rows import contiguous
from .triton_compat import tl, triton


@triton.jit
def add_to_dq(
    b_dq, b_q, b_dout, b_lse, b_rest, b_delta, p_k, p_v, p_mask, o_m, lo, a, b, hi, q_hi, k_hi, shift,
    k_stride_s, v_stride_s, mask_stride_m, mask_stride_n, scale, softcap, window,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What tiles of keys add to dq / scale: a <= j < b, or if MASKED the rest of lo <= j < hi."""
    factor = scale * LOG2E if softcap is None else softcap * LOG2E
    o_row, o_d = tl.arange(0, BLOCK_N).to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
    p_k += o_row * k_stride_s + o_d
    p_v += o_row * v_stride_s + o_d
    for i in range(0, count_tiles(lo, a, b, hi, BLOCK_N, MASKED)):
        start = tile_start(i, lo, a, b, BLOCK_N, MASKED)
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = (o_n < k_hi)[:, None]
        b_k = load_rows(p_k + tl.cast(start, tl.int64) * k_stride_s, m_n, HEAD_DIM, BLOCK_D, MASKED)
        b_v = load_rows(p_v + tl.cast(start, tl.int64) * v_stride_s, m_n, HEAD_DIM, BLOCK_D, MASKED)
        b_s = dot(b_q, tl.trans(b_k), None, INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        if softcap is not None:
            b_s = tanh(b_s * (scale / softcap))
        b_exponent = b_s * factor - b_lse[:, None]
        if b_q.dtype == tl.float32:
            b_exponent -= b_rest[:, None]
        if MASKED:
            m_s = may_attend(p_mask, o_m, o_n, mask_stride_m, mask_stride_n, q_hi, k_hi, shift, window, CAUSAL)
            b_exponent = tl.where(m_s, b_exponent, float("-inf"))
        b_p = tl.exp2(b_exponent)
        b_dp = dot(b_dout, tl.trans(b_v), None, INPUT_PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if softcap is not None:
            b_ds *= 1.0 - b_s * b_s
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq, INPUT_PRECISION)
    return b_dq


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_dq_kernel(
    p_q, p_k, p_v, p_out, p_dout, p_lse, p_dlse, p_rows, p_dq, p_mask, p_key_start, p_key_end, p_cu_q, p_cu_k,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    HEADS, SEQ_Q, SEQ_K, SEQUENCES, TILES, PAIRS, SECTION, ROWS, scale, softcap, window,
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
    p_q += i_b * q_stride_b + i_h * q_stride_h
    p_dout += i_b * dout_stride_b + i_h * dout_stride_h
    p_k += i_b * k_stride_b + i_h // GROUP * k_stride_h
    p_v += i_b * v_stride_b + i_h // GROUP * v_stride_h
    if p_mask is not None:
        p_mask += i_b * mask_stride_b + i_h * mask_stride_h
    o_row = o_m.to(tl.int64)[:, None]
    o_out = ((i_b * SEQ_Q + o_row) * HEADS + i_h) * HEAD_DIM + o_d[None, :]  # of out and dq
    o_lse = (i_b * HEADS + i_h) * SEQ_Q + o_m
    b_q = load_rows(p_q + o_row * q_stride_s + o_d[None, :], m_m[:, None], HEAD_DIM, BLOCK_D, MASKED=True)
    b_dout = load_rows(p_dout + o_row * dout_stride_s + o_d[None, :], m_m[:, None], HEAD_DIM, BLOCK_D, MASKED=True)
    b_out = load_rows(p_out + o_out, m_m[:, None], HEAD_DIM, BLOCK_D, MASKED=True)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), axis=1)
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + o_lse, mask=m_m, other=0.0).to(tl.float32)
    # in base 2; with +inf for -inf p is 0 for any score, also for the keys out of range that share a tile with others
    b_wide_lse = tl.load(p_lse + o_lse, mask=m_m, other=0.0) * LOG2E
    sees_nothing = b_wide_lse == float("-inf")
    b_lse = tl.where(sees_nothing, float("inf"), b_wide_lse.to(tl.float32))
    b_rest = tl.where(sees_nothing, 0.0, (b_wide_lse - b_lse.to(tl.float64)).to(tl.float32))
    b_delta = tl.where(sees_nothing, 0.0, b_delta)  # the gradient of logaddexp(-inf, -inf) is NaN
    tl.store(p_rows + o_lse, b_lse, mask=m_m)
    tl.store(p_rows + ROWS + o_lse, b_delta, mask=m_m)
    tl.store(p_rows + ROWS + ROWS + o_lse, b_rest, mask=m_m)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if lo < a or b < hi:
        b_dq = add_to_dq(
            b_dq, b_q, b_dout, b_lse, b_rest, b_delta, p_k, p_v, p_mask, o_m, lo, a, b, hi, q_hi, k_hi, shift,
            k_stride_s, v_stride_s, mask_stride_m, mask_stride_n, scale, softcap, window,
            CAUSAL, HEAD_DIM, BLOCK_D, MASKED_BLOCK, INPUT_PRECISION, MASKED=True,
        )  # fmt: skip
    if a < b:
        b_dq = add_to_dq(
            b_dq, b_q, b_dout, b_lse, b_rest, b_delta, p_k, p_v, p_mask, o_m, lo, a, b, hi, q_hi, k_hi, shift,
            k_stride_s, v_stride_s, mask_stride_m, mask_stride_n, scale, softcap, window,
            CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_N, INPUT_PRECISION, MASKED=False,
        )  # fmt: skip
    store_rows(p_dq + o_out, b_dq * scale, m_m[:, None], HEAD_DIM, BLOCK_D)


@triton.jit
def load_vector(p, m, MASKED: tl.constexpr):
    return tl.load(p, mask=m, other=0.0) if MASKED else tl.load(p)


@triton.jit
def add_to_dk_dv(
    b_dk, b_dv, b_k, b_v, p_q, p_dout, p_rows, p_mask, o_n, lo, a, b, hi, q_hi, k_hi, shift,
    q_stride_h, q_stride_s, dout_stride_h, dout_stride_s, mask_stride_h, mask_stride_m, mask_stride_n,
    SEQ_Q, ROWS, scale, softcap, window,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What tiles of queries of all heads of the group add to dk / scale and dv: a <= i < b, or if MASKED the rest."""
    factor = scale * LOG2E if softcap is None else softcap * LOG2E
    o_row, o_d = tl.arange(0, BLOCK_M).to(tl.int64)[:, None], tl.arange(0, BLOCK_D)[None, :]
    p_q += o_row * q_stride_s + o_d
    p_dout += o_row * dout_stride_s + o_d
    tiles = count_tiles(lo, a, b, hi, BLOCK_M, MASKED)
    first = tile_start(0, lo, a, b, BLOCK_M, MASKED)
    end = hi if MASKED else b
    start = first
    i_g = 0
    for _ in range(0, tiles * GROUP):  # heads and tiles in one loop: its pipeline never runs dry between heads
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < q_hi
        o_q = tl.cast(i_g, tl.int64) * q_stride_h + tl.cast(start, tl.int64) * q_stride_s
        o_dout = tl.cast(i_g, tl.int64) * dout_stride_h + tl.cast(start, tl.int64) * dout_stride_s
        o_lse = tl.cast(i_g, tl.int64) * SEQ_Q + o_m
        b_q = load_rows(p_q + o_q, m_m[:, None], HEAD_DIM, BLOCK_D, MASKED)
        b_dout = load_rows(p_dout + o_dout, m_m[:, None], HEAD_DIM, BLOCK_D, MASKED)
        b_s = dot(b_k, tl.trans(b_q), None, INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
        b_dp = dot(b_v, tl.trans(b_dout), None, INPUT_PRECISION)
        if softcap is not None:
            b_s = tanh(b_s * (scale / softcap))
        # past the end q, dout, lse and delta are 0: p = 1 adds nothing to dv, and ds = 0
        b_exponent = b_s * factor - load_vector(p_rows + o_lse, m_m, MASKED)[None, :]
        if b_q.dtype == tl.float32:
            b_exponent -= load_vector(p_rows + ROWS + ROWS + o_lse, m_m, MASKED)[None, :]
        if MASKED:
            m_s = visible(o_m[None, :], (o_n - shift)[:, None], k_hi - shift, window, CAUSAL)
            if p_mask is not None:
                p_mask_head = p_mask + tl.cast(i_g, tl.int64) * mask_stride_h
                m_s &= load_mask(p_mask_head, o_m[None, :], o_n[:, None], mask_stride_m, mask_stride_n, q_hi, k_hi)
            b_exponent = tl.where(m_s, b_exponent, float("-inf"))
        b_p = tl.exp2(b_exponent)
        b_ds = b_p * (b_dp - load_vector(p_rows + ROWS + o_lse, m_m, MASKED)[None, :])
        if softcap is not None:
            b_ds *= 1.0 - b_s * b_s
        b_dv = dot(b_p.to(b_dout.dtype), b_dout, b_dv, INPUT_PRECISION)
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk, INPUT_PRECISION)
        start += BLOCK_M
        if MASKED:
            start = tl.where((start >= a) & (start < b), b, start)
        if GROUP > 1:
            is_last = start >= end
            i_g += is_last.to(tl.int32)
            start = tl.where(is_last, first, start)
    return b_dk, b_dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_dk_dv_kernel(
    p_q, p_k, p_v, p_dout, p_rows, p_dk, p_dv, p_mask, p_key_start, p_key_end, p_cu_q, p_cu_k,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    HEADS, SEQ_Q, SEQ_K, SEQUENCES, TILES, PAIRS, SECTION, ROWS, scale, softcap, window,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_BLOCK: tl.constexpr, IN_SHARES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    i_tile, i_pair = next_tile(TILES, PAIRS, SECTION, IN_SHARES)
    KV_HEADS = HEADS // GROUP
    i_b, i_h = (i_pair // KV_HEADS).to(tl.int64), (i_pair % KV_HEADS).to(tl.int64)
    i_s = 0
    rows_lo = 0
    rows_hi = SEQ_K
    if p_cu_k is not None:
        i_s, i_tile = sequence_of_tile(p_cu_k, i_tile, SEQUENCES, BLOCK_N)
        rows_lo = tl.load(p_cu_k + i_s)
        rows_hi = tl.load(p_cu_k + i_s + 1, mask=i_s < SEQUENCES, other=SEQ_K)
    q_lo, q_hi, k_lo, k_hi = sequence_bounds(p_key_start, p_key_end, p_cu_q, p_cu_k, i_b, i_s, SEQUENCES, SEQ_Q, SEQ_K)
    rows_lo += i_tile * BLOCK_N
    if rows_lo >= rows_hi:
        return
    shift = k_hi - q_hi
    j_lo, j_hi = tl.maximum(rows_lo, k_lo), tl.minimum(rows_lo + BLOCK_N, k_hi)

    o_n, o_d = rows_lo + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    m_n = (o_n < rows_hi)[:, None]
    o_row = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    i_row = tl.cast(rows_lo, tl.int64)
    p_k += i_b * k_stride_b + i_h * k_stride_h + i_row * k_stride_s
    p_v += i_b * v_stride_b + i_h * v_stride_h + i_row * v_stride_s
    o_first = ((i_b * SEQ_K + i_row) * KV_HEADS + i_h) * HEAD_DIM
    i_first = i_h * GROUP  # the first query head of the group
    p_q += i_b * q_stride_b + i_first * q_stride_h
    p_dout += i_b * dout_stride_b + i_first * dout_stride_h
    p_rows += (i_b * HEADS + i_first) * SEQ_Q
    if p_mask is not None:
        p_mask += i_b * mask_stride_b + i_first * mask_stride_h

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if p_key_start is not None or p_key_end is not None:
        # keys outside of the range are computed with the others of the tile, and not stored: zeros made at the end spill
        o_dk = o_row * (KV_HEADS * HEAD_DIM) + o_d
        m_outside = m_n & ((o_n < k_lo) | (o_n >= k_hi))[:, None]
        store_rows(p_dk + o_first + o_dk, b_dk, m_outside, HEAD_DIM, BLOCK_D)
        store_rows(p_dv + o_first + o_dk, b_dv, m_outside, HEAD_DIM, BLOCK_D)
    if j_lo < j_hi:
        lo, a, b, hi = query_tiles(j_lo, j_hi, q_lo, q_hi, shift, window, p_mask, CAUSAL, BLOCK_M, MASKED_BLOCK)
        b_k = load_rows(p_k + o_row * k_stride_s + o_d, m_n, HEAD_DIM, BLOCK_D, MASKED=True)
        b_v = load_rows(p_v + o_row * v_stride_s + o_d, m_n, HEAD_DIM, BLOCK_D, MASKED=True)
        if lo < a or b < hi:
            b_dk, b_dv = add_to_dk_dv(
                b_dk, b_dv, b_k, b_v, p_q, p_dout, p_rows, p_mask, o_n, lo, a, b, hi, q_hi, k_hi, shift,
                q_stride_h, q_stride_s, dout_stride_h, dout_stride_s, mask_stride_h, mask_stride_m, mask_stride_n,
                SEQ_Q, ROWS, scale, softcap, window,
                CAUSAL, GROUP, HEAD_DIM, BLOCK_D, MASKED_BLOCK, INPUT_PRECISION, MASKED=True,
            )  # fmt: skip
        if a < b:
            b_dk, b_dv = add_to_dk_dv(
                b_dk, b_dv, b_k, b_v, p_q, p_dout, p_rows, p_mask, o_n, lo, a, b, hi, q_hi, k_hi, shift,
                q_stride_h, q_stride_s, dout_stride_h, dout_stride_s, mask_stride_h, mask_stride_m, mask_stride_n,
                SEQ_Q, ROWS, scale, softcap, window,
                CAUSAL, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, INPUT_PRECISION, MASKED=False,
            )  # fmt: skip

    b_dk *= scale
    o_dk = o_row * (KV_HEADS * HEAD_DIM) + o_d
    if p_key_start is not None or p_key_end is not None:
        m_n = ((o_n >= j_lo) & (o_n < j_hi))[:, None]
    store_rows(p_dk + o_first + o_dk, b_dk, m_n, HEAD_DIM, BLOCK_D)
    store_rows(p_dv + o_first + o_dk, b_dv, m_n, HEAD_DIM, BLOCK_D)


DQ_TILES = {
    "sm_80": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 8, 2)),
    "sm_90": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2)),
    "sm_100": (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 32, 8, 2)),
    "gfx942": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
    "float32": (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 1)),
}
DK_DV_TILES = {
    "sm_80": (Tile(64, 128, 8, 3), Tile(32, 64, 4, 3), Tile(32, 32, 8, 2)),
    "sm_90": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(32, 64, 8, 2)),
    "sm_100": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 2), Tile(32, 64, 8, 2)),
    "gfx942": (Tile(32, 128, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
    "float32": (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 16, 4, 1)),
}
"""For head_dim up to 64, 128, 256, as `attention.TILES`. Every tile with HGMMA that was tried for dk and dv at 256 on sm_90
spills: this one 532 bytes a thread with 32 local accesses in its loops, half its queries 312 and 8, but with twice the steps."""


def plan_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, pattern: Pattern, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """Backward, as launches in order. `dout, q, k, v` as `as_batch` makes them, `out` and the gradients as `empty_rows`
    does, `lse` and `dlse` contiguous."""
    batch, heads, seq_q, head_dim = q.shape
    kv_heads, seq_k = k.shape[1:3]
    group = heads // kv_heads
    row_bytes = 2 * head_dim * q.element_size()  # of k and v, or of q and dout
    # of every query: lse in base 2, delta, and what lse lost when it was rounded
    rows = torch.empty((3, *lse.shape), dtype=torch.float32, device=q.device)
    arguments = dict(
        p_dout=dout, p_rows=rows, ROWS=lse.numel(),
        dout_stride_b=dout.stride(0), dout_stride_h=dout.stride(1), dout_stride_s=dout.stride(2),
    )  # fmt: skip
    dq_tile, dk_dv_tile = _tiles(head_dim, q.element_size(), gpu)
    plan_dq = plan_tiles(
        attention_dq_kernel, q, k, v, pattern, arguments | dict(p_out=out, p_lse=lse, p_dlse=dlse, p_dq=dq),
        rows=seq_q, pairs=batch * heads, pair_bytes=row_bytes * seq_k // group, over_keys=True, tile=dq_tile, gpu=gpu,
    )  # fmt: skip
    plan_dk_dv = plan_tiles(
        attention_dk_dv_kernel, q, k, v, pattern, arguments | dict(p_dk=dk, p_dv=dv),
        rows=seq_k, pairs=batch * kv_heads, pair_bytes=row_bytes * seq_q * group, over_keys=False, tile=dk_dv_tile, gpu=gpu,
    )  # fmt: skip
    return [plan_dq, plan_dk_dv]


@functools.cache
def _tiles(head_dim: int, itemsize: int, gpu: Gpu) -> tuple[Tile, Tile]:
    """For dq, and for dk and dv."""
    dq, dk_dv = tile_for(DQ_TILES, head_dim, itemsize, gpu), tile_for(DK_DV_TILES, head_dim, itemsize, gpu)
    return (
        fit_stages(dq, head_dim, itemsize, 2 * dq.block_m, 2 * dq.block_n, gpu),
        fit_stages(dk_dv, head_dim, itemsize, 2 * dk_dv.block_n, 2 * dk_dv.block_m, gpu),
    )


def _kernel(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _fake(dout, dlse, q, k, v, out, lse, *options)
    plans = plan_attention_backward(
        as_batch(dout), contiguous(dlse), as_batch(q), as_batch(k), as_batch(v), as_empty_rows(out), lse.contiguous(),
        dq, dk, dv, read_pattern(options), gpu_of(q.device),
    )  # fmt: skip
    for plan in plans:
        plan.launch()
    return dq, dk, dv


def _pytorch(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_pytorch.backward(dout, dlse, q, k, v, out, lse, Pattern(*options))


def _fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(q), empty_rows(k), empty_rows(v)


attention_backward_op = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {PATTERN_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.attention_backward,
    pytorch_is_faster=lambda dout, dlse, q, k, *_: pytorch_is_faster_on_cpu(q, k),
)  # fmt: skip
