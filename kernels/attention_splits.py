"""The splits of a row's keys that `attention_decode` gives to programs of their own: where they are, and the sum of what they found."""

from torch import Tensor

from .attention_common import LOG2E, block_d
from .launch import Gpu, LaunchPlan, next_power_of_2
from .triton_compat import tl, triton

NOT_SPECIALIZED = ["max_len", "window", "splits", "STATS", "table_stride"]
"""Sizes that change while a cache grows: no binary of its own for a multiple of 16 or a 1."""

ANY_ALIGNMENT = ["p_cache_lens", "p_key_start", "p_block_table"]
"""Read one number at a time, and often rows of a larger tensor: no binary of its own for an aligned address."""


@triton.jit
def key_range(p_cache_lens, p_key_start, i_b, max_len, window, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys [start, end) of row i_b, and how many of them each of its splits takes."""
    end = tl.minimum(tl.maximum(tl.load(p_cache_lens + i_b), 0), max_len)
    start = 0
    if p_key_start is not None:  # cut, as all arguments are: the splits of one near 2^31 would wrap around
        start = tl.minimum(tl.maximum(tl.load(p_key_start + i_b), 0), end)
    if window is not None:
        start = tl.maximum(start, end - window)
    blocks = tl.cdiv(tl.maximum(end - start, 1), BLOCK_N)
    return start, end, tl.cdiv(blocks, MAX_SPLITS) * BLOCK_N


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def attention_decode_combine_kernel(
    p_partial, p_out, p_cache_lens, p_key_start, max_len, window, splits, STATS,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one query head, BLOCK_S at a time: the order depends on how many the row has, nothing else."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_bh = tl.program_id(0).to(tl.int64)
    start, end, split_keys = key_range(p_cache_lens, p_key_start, i_bh // HEADS, max_len, window, MAX_SPLITS, BLOCK_N)
    count = tl.cdiv(end - start, split_keys)
    o_d = tl.arange(0, BLOCK_D)
    b_max = float("-inf")
    b_sum = 0.0
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start_s in range(0, count, BLOCK_S):
        o_s = start_s + tl.arange(0, BLOCK_S)
        m_s = o_s < count
        p_stats = p_partial + STATS + 2 * (i_bh * splits + o_s)
        b_split_max = tl.load(p_stats, mask=m_s, other=float("-inf"))
        b_split_sum = tl.load(p_stats + 1, mask=m_s, other=0.0)
        p_split = p_partial + (i_bh * splits + o_s[:, None]) * HEAD_DIM + o_d[None, :]
        b_out = tl.load(p_split, mask=m_s[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)  # [BLOCK_S, BLOCK_D]
        b_new = tl.maximum(b_max, tl.max(b_split_max, 0))  # finite: a split that counts has keys
        alpha = tl.exp2((b_max - b_new) * LOG2E)
        b_w = tl.exp2((b_split_max - b_new) * LOG2E)
        b_sum = b_sum * alpha + tl.sum(b_w * b_split_sum, 0)
        acc = acc * alpha + tl.sum(b_w[:, None] * b_out, 0)
        b_max = b_new
    tl.store(p_out + i_bh * HEAD_DIM + o_d, acc / tl.where(b_sum > 0.0, b_sum, 1.0), mask=o_d < HEAD_DIM)


def plan_combine(
    partial: Tensor, out: Tensor, cache_lens: Tensor, key_start: Tensor | None, *, max_len: int, window: int | None,
    splits: int, stats: int, max_splits: int, block_n: int, gpu: Gpu,
) -> LaunchPlan:  # fmt: skip
    """The kernel that adds up (batch, heads, splits, head_dim) float32 of `partial`, whose sums stand `stats` elements behind."""
    batch, heads, _, head_dim = out.shape
    columns = block_d(head_dim)
    return LaunchPlan(
        attention_decode_combine_kernel,
        grid=(batch * heads,),
        arguments=dict(
            p_partial=partial, p_out=out, p_cache_lens=cache_lens, p_key_start=key_start,
            max_len=max_len, window=window, splits=splits, STATS=stats,
        ),
        constants=dict(
            HEADS=heads, HEAD_DIM=head_dim, MAX_SPLITS=max_splits, BLOCK_N=block_n,
            BLOCK_S=min(8192 // columns, next_power_of_2(max_splits) if gpu.is_cpu else 8192), BLOCK_D=columns, PDL=gpu.has_pdl,
        ),
        num_warps=8,
        pdl=gpu.has_pdl,
    )  # fmt: skip
