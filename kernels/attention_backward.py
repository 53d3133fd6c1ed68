"""Flash attention, backward: dq, dk and dv without the matrix of scores, in a fixed order, without atomics.

With p_ij = e^(s_ij - lse_i) computed again and delta_i = sum_d dout_id * out_id - dlse_i:

    dv_j = sum_i p_ij dout_i        ds_ij = p_ij * (dout_i . v_j - delta_i)        (times 1 - tanh^2 with a softcap)
    dq_i = scale * sum_j ds_ij k_j        dk_j = scale * sum_i ds_ij q_i

On a GPU two kernels, in this order. For dq a program owns BLOCK_M queries of one head, computes their delta (and keeps it for
the second kernel) and walks over their keys. For dk and dv a program owns BLOCK_N keys of one key head and walks over the
queries of all heads of its group, so that the sum over the group is made in its registers, in float32. Both walk as the
forward kernel does (`attention_common`). Scores are computed twice: 14 * seq_q * seq_k * head_dim FLOPs a head, half of
them if causal, against 10 for one kernel that adds up dq with atomics in no fixed order. lse comes in float64; of its two
float32 parts the smaller one counts where products are float32, and is left out where they are not.

A CPU has few cores. Where there are enough key heads for them a program owns one, with all queries of its group, and takes its
tiles of keys one after the other: nobody else adds to its dq, which needs no atomics, and five products do (`attention_by_keys`).

Paper: Dao, FlashAttention-2, 2023 (arXiv:2307.08691).
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import attention_pytorch, flops
from .activation import tanh
from .attention_by_keys import attention_backward_kernel, attention_dk_dv_kernel, row_sums
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
from .launch import Gpu, LaunchPlan, cdiv, gpu_of
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
    b_lse, b_rest, b_delta = row_sums(b_out, b_dout, p_lse, p_dlse, p_rows, o_lse, m_m, ROWS)

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
    if gpu.is_cpu and _fill_cores(batch * kv_heads, gpu.multiprocessors):
        is_sum = dq.dtype == torch.float32
        sums = dq if is_sum else torch.empty_strided(dq.shape, dq.stride(), dtype=torch.float32, device=dq.device)
        arguments |= dict(p_out=out, p_lse=lse, p_dlse=dlse, p_dk=dk, p_dv=dv)
        plan = plan_tiles(
            attention_backward_kernel, q, k, v, pattern, arguments | dict(p_dq_sums=sums, p_dq=None if is_sum else dq),
            rows=seq_k, pairs=batch * kv_heads, pair_bytes=0, over_keys=False, tile=dk_dv_tile, gpu=gpu,
        )  # fmt: skip
        return [replace(plan, grid=(batch * kv_heads,))]
    plan_dq = plan_tiles(
        attention_dq_kernel, q, k, v, pattern, arguments | dict(p_out=out, p_lse=lse, p_dlse=dlse, p_dq=dq),
        rows=seq_q, pairs=batch * heads, pair_bytes=row_bytes * seq_k // group, over_keys=True, tile=dq_tile, gpu=gpu,
    )  # fmt: skip
    plan_dk_dv = plan_tiles(
        attention_dk_dv_kernel, q, k, v, pattern, arguments | dict(p_dk=dk, p_dv=dv),
        rows=seq_k, pairs=batch * kv_heads, pair_bytes=row_bytes * seq_q * group, over_keys=False, tile=dk_dv_tile, gpu=gpu,
    )  # fmt: skip
    return [plan_dq, plan_dk_dv]


def _fill_cores(programs: int, cores: int) -> bool:
    """Whether programs that do five products each, on cores of which some may end early, take less time than seven on all of them."""
    return 7 * programs > 5 * cdiv(programs, cores) * cores


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
