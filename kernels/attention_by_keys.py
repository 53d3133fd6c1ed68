"""Flash attention, backward, of keys: the kernel for dk and dv, and the one that makes dq with them. See `attention_backward`."""

from .activation import tanh
from .attention_common import (
    LOG2E,
    NOT_SPECIALIZED,
    count_tiles,
    load_mask,
    load_rows,
    next_tile,
    query_tiles,
    sequence_bounds,
    sequence_of_tile,
    store_rows,
    tile_start,
    visible,
)
from .dot import dot
from .triton_compat import tl, triton


@triton.jit
def row_sums(b_out, b_dout, p_lse, p_dlse, p_rows, o_lse, m_m, ROWS):
    """Of queries: lse in base 2, its rest, and delta. All are kept, too, for who comes to these queries again."""
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
    return b_lse, b_rest, b_delta


@triton.jit
def load_vector(p, m, MASKED: tl.constexpr):
    return tl.load(p, mask=m, other=0.0) if MASKED else tl.load(p)


@triton.jit
def add_to_dk_dv(
    b_dk, b_dv, b_k, b_v, p_q, p_dout, p_rows, p_dq, p_mask, o_n, m_n, lo, a, b, hi, q_hi, k_hi, shift,
    q_stride_h, q_stride_s, dout_stride_h, dout_stride_s, mask_stride_h, mask_stride_m, mask_stride_n,
    HEADS, SEQ_Q, ROWS, scale, softcap, window,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, IN_SHARES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What tiles of queries of all heads of the group add to dk / scale and dv: a <= i < b, or if MASKED the rest.

    With `p_dq` the keys for which `m_n` is true are added to these queries' dq, too.
    """
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
        b_seen_k, b_seen_v = b_k, b_v
        if IN_SHARES and CAUSAL and MASKED:  # no products of keys that none of these queries sees: the last rows
            m_seen = (o_n < start + BLOCK_M + shift)[:, None]
            b_seen_k, b_seen_v = tl.where(m_seen, b_k, 0.0), tl.where(m_seen, b_v, 0.0)
        b_s = dot(b_seen_k, tl.trans(b_q), None, INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
        b_dp = dot(b_seen_v, tl.trans(b_dout), None, INPUT_PRECISION)
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
        if p_dq is not None:
            b_exponent = tl.where(m_n, b_exponent, float("-inf"))
        b_p = tl.exp2(b_exponent)
        b_ds = b_p * (b_dp - load_vector(p_rows + ROWS + o_lse, m_m, MASKED)[None, :])
        if softcap is not None:
            b_ds *= 1.0 - b_s * b_s
        if IN_SHARES and CAUSAL and MASKED:
            b_p, b_ds = tl.where(m_seen, b_p, 0.0), tl.where(m_seen, b_ds, 0.0)
        b_dv = dot(b_p.to(b_dout.dtype), b_dout, b_dv, INPUT_PRECISION)
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk, INPUT_PRECISION)
        if p_dq is not None:
            b_dq = dot(tl.trans(b_ds.to(b_k.dtype)), b_seen_k, None, INPUT_PRECISION)
            o_dq = (tl.cast(start, tl.int64) * HEADS + i_g) * HEAD_DIM + o_row * (HEADS * HEAD_DIM) + o_d
            b_dq = load_rows(p_dq + o_dq, m_m[:, None], HEAD_DIM, BLOCK_D, MASKED) + b_dq * scale
            store_rows(p_dq + o_dq, b_dq, m_m[:, None], HEAD_DIM, BLOCK_D)
        start += BLOCK_M
        if MASKED:
            start = tl.where((start >= a) & (start < b), b, start)
        if GROUP > 1:
            is_last = start >= end
            i_g += is_last.to(tl.int32)
            start = tl.where(is_last, first, start)
    return b_dk, b_dv


@triton.jit
def tile_of_keys(p_key_start, p_key_end, p_cu_q, p_cu_k, i_tile, i_b, SEQ_Q, SEQ_K, SEQUENCES, BLOCK_N: tl.constexpr):
    """The bounds of the queries and keys of the tile's sequence, and its rows, which are keys in that range or out of it."""
    i_s = 0
    rows_lo = 0
    rows_hi = SEQ_K
    if p_cu_k is not None:
        i_s, i_tile = sequence_of_tile(p_cu_k, i_tile, SEQUENCES, BLOCK_N)
        rows_lo = tl.load(p_cu_k + i_s)
        rows_hi = tl.load(p_cu_k + i_s + 1, mask=i_s < SEQUENCES, other=SEQ_K)
    q_lo, q_hi, k_lo, k_hi = sequence_bounds(p_key_start, p_key_end, p_cu_q, p_cu_k, i_b, i_s, SEQUENCES, SEQ_Q, SEQ_K)
    return q_lo, q_hi, k_lo, k_hi, rows_lo + i_tile * BLOCK_N, rows_hi


@triton.jit
def dk_dv_of_tile(
    p_q, p_k, p_v, p_dout, p_rows, p_dq, p_dk, p_dv, p_mask, p_key_start, p_key_end,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    i_b, i_h, q_lo, q_hi, k_lo, k_hi, rows_lo, rows_hi, HEADS, SEQ_Q, SEQ_K, ROWS, scale, softcap, window,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_BLOCK: tl.constexpr, IN_SHARES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys rows_lo..rows_hi, as many as a tile has, of kv head `i_h`; added to dq, if there is a `p_dq`."""
    KV_HEADS = HEADS // GROUP
    shift = k_hi - q_hi
    j_lo, j_hi = tl.maximum(rows_lo, k_lo), tl.minimum(rows_lo + BLOCK_N, k_hi)

    o_n, o_d = rows_lo + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    m_n = (o_n < rows_hi)[:, None]
    m_range = ((o_n >= j_lo) & (o_n < j_hi))[:, None]
    o_row = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    i_row = tl.cast(rows_lo, tl.int64)
    p_k += i_b * k_stride_b + i_h * k_stride_h + i_row * k_stride_s
    p_v += i_b * v_stride_b + i_h * v_stride_h + i_row * v_stride_s
    o_first = ((i_b * SEQ_K + i_row) * KV_HEADS + i_h) * HEAD_DIM
    i_first = i_h * GROUP  # the first query head of the group
    p_q += i_b * q_stride_b + i_first * q_stride_h
    p_dout += i_b * dout_stride_b + i_first * dout_stride_h
    p_rows += (i_b * HEADS + i_first) * SEQ_Q
    if p_dq is not None:
        p_dq += (i_b * SEQ_Q * HEADS + i_first) * HEAD_DIM
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
        m_k = m_n if p_dq is None else m_range  # of keys out of the range nothing may get into dq
        b_k = load_rows(p_k + o_row * k_stride_s + o_d, m_k, HEAD_DIM, BLOCK_D, MASKED=True)
        b_v = load_rows(p_v + o_row * v_stride_s + o_d, m_k, HEAD_DIM, BLOCK_D, MASKED=True)
        if lo < a or b < hi:
            b_dk, b_dv = add_to_dk_dv(
                b_dk, b_dv, b_k, b_v, p_q, p_dout, p_rows, p_dq, p_mask, o_n, m_range, lo, a, b, hi, q_hi, k_hi, shift,
                q_stride_h, q_stride_s, dout_stride_h, dout_stride_s, mask_stride_h, mask_stride_m, mask_stride_n,
                HEADS, SEQ_Q, ROWS, scale, softcap, window,
                CAUSAL, GROUP, HEAD_DIM, BLOCK_D, MASKED_BLOCK, INPUT_PRECISION, IN_SHARES, MASKED=True,
            )  # fmt: skip
        if a < b:
            b_dk, b_dv = add_to_dk_dv(
                b_dk, b_dv, b_k, b_v, p_q, p_dout, p_rows, p_dq, p_mask, o_n, m_range, lo, a, b, hi, q_hi, k_hi, shift,
                q_stride_h, q_stride_s, dout_stride_h, dout_stride_s, mask_stride_h, mask_stride_m, mask_stride_n,
                HEADS, SEQ_Q, ROWS, scale, softcap, window,
                CAUSAL, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, INPUT_PRECISION, IN_SHARES, MASKED=False,
            )  # fmt: skip

    b_dk *= scale
    o_dk = o_row * (KV_HEADS * HEAD_DIM) + o_d
    if p_key_start is not None or p_key_end is not None:
        m_n = m_range
    store_rows(p_dk + o_first + o_dk, b_dk, m_n, HEAD_DIM, BLOCK_D)
    store_rows(p_dv + o_first + o_dk, b_dv, m_n, HEAD_DIM, BLOCK_D)


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
    q_lo, q_hi, k_lo, k_hi, rows_lo, rows_hi = tile_of_keys(
        p_key_start, p_key_end, p_cu_q, p_cu_k, i_tile, i_b, SEQ_Q, SEQ_K, SEQUENCES, BLOCK_N
    )
    if rows_lo >= rows_hi:
        return
    dk_dv_of_tile(
        p_q, p_k, p_v, p_dout, p_rows, None, p_dk, p_dv, p_mask, p_key_start, p_key_end,
        q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
        dout_stride_b, dout_stride_h, dout_stride_s, mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
        i_b, i_h, q_lo, q_hi, k_lo, k_hi, rows_lo, rows_hi, HEADS, SEQ_Q, SEQ_K, ROWS, scale, softcap, window,
        CAUSAL, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, MASKED_BLOCK, IN_SHARES, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_backward_kernel(
    p_q, p_k, p_v, p_out, p_dout, p_lse, p_dlse, p_rows, p_dq_sums, p_dq, p_dk, p_dv,
    p_mask, p_key_start, p_key_end, p_cu_q, p_cu_k,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dout_stride_b, dout_stride_h, dout_stride_s, mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    HEADS, SEQ_Q, SEQ_K, SEQUENCES, TILES, PAIRS, SECTION, ROWS, scale, softcap, window,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_BLOCK: tl.constexpr, IN_SHARES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """A kv head with all its queries and keys."""
    i_pair = tl.program_id(0)
    KV_HEADS = HEADS // GROUP
    i_b, i_h = (i_pair // KV_HEADS).to(tl.int64), (i_pair % KV_HEADS).to(tl.int64)

    o_d = tl.arange(0, BLOCK_D)[None, :]
    for i_first in range(0, SEQ_Q, BLOCK_M):
        o_m = i_first + tl.arange(0, BLOCK_M)
        m_m = o_m < SEQ_Q
        for i_g in range(0, GROUP):
            i_head = i_h * GROUP + i_g
            o_row = o_m.to(tl.int64)[:, None]
            o_out = ((i_b * SEQ_Q + o_row) * HEADS + i_head) * HEAD_DIM + o_d
            o_dout = i_b * dout_stride_b + i_head * dout_stride_h + o_row * dout_stride_s + o_d
            b_out = load_rows(p_out + o_out, m_m[:, None], HEAD_DIM, BLOCK_D, MASKED=True)
            b_dout = load_rows(p_dout + o_dout, m_m[:, None], HEAD_DIM, BLOCK_D, MASKED=True)
            row_sums(b_out, b_dout, p_lse, p_dlse, p_rows, (i_b * HEADS + i_head) * SEQ_Q + o_m, m_m, ROWS)
            store_rows(p_dq_sums + o_out, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), m_m[:, None], HEAD_DIM, BLOCK_D)

    for i_tile in range(0, TILES):
        q_lo, q_hi, k_lo, k_hi, rows_lo, rows_hi = tile_of_keys(
            p_key_start, p_key_end, p_cu_q, p_cu_k, i_tile, i_b, SEQ_Q, SEQ_K, SEQUENCES, BLOCK_N
        )
        if rows_lo < rows_hi:
            dk_dv_of_tile(
                p_q, p_k, p_v, p_dout, p_rows, p_dq_sums, p_dk, p_dv, p_mask, p_key_start, p_key_end,
                q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
                v_stride_b, v_stride_h, v_stride_s, dout_stride_b, dout_stride_h, dout_stride_s,
                mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
                i_b, i_h, q_lo, q_hi, k_lo, k_hi, rows_lo, rows_hi, HEADS, SEQ_Q, SEQ_K, ROWS, scale, softcap, window,
                CAUSAL, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, MASKED_BLOCK, IN_SHARES, INPUT_PRECISION,
            )  # fmt: skip

    if p_dq is not None:
        for i_first in range(0, SEQ_Q, BLOCK_M):
            o_m = i_first + tl.arange(0, BLOCK_M)
            m_m = (o_m < SEQ_Q)[:, None]
            for i_g in range(0, GROUP):
                o_out = ((i_b * SEQ_Q + o_m.to(tl.int64)[:, None]) * HEADS + i_h * GROUP + i_g) * HEAD_DIM + o_d
                b_dq = load_rows(p_dq_sums + o_out, m_m, HEAD_DIM, BLOCK_D, MASKED=True)
                store_rows(p_dq + o_out, b_dq, m_m, HEAD_DIM, BLOCK_D)
