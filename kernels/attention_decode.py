"""Attention of one new query a row over a KV cache (flash-decoding): the keys are split over programs, then combined.

    out[b, h] = softmax(scale * q[b, h] @ K^T) @ V        over the keys start[b] <= j < end[b]

with end = cache_len and start = max(key_start, end - window); softcap * tanh(logit / softcap) first, if asked.

A program owns one split of one row's keys for one kv head, with all the query heads of that kv head as the rows of its
tile (padded to 16, the least that a tensor core takes), so k and v are read once: 4 * head_dim bytes a key and kv head in
bf16, for 4 * head_dim FLOPs a query head. Memory bound: a padded tile does 16 FLOPs a byte, an H100 has 295 to give, so
query heads that stand alone (no GQA) take the same path. A second kernel adds the float32 partials of the splits in a
fixed order; a cache that fits one split needs none. Inference only: nothing is kept for a backward pass.

A row's splits start at its first key, and their size follows from the number of its keys alone (`key_range`): BLOCK_N keys,
or the next multiple of it that needs no more than MAX_SPLITS splits. So the bits of a row depend on its own query and keys,
on dtype, head_dim, number of heads and model of GPU; not on the other rows, batch, max_len, strides or paging.

The grid depends on max_len and window, never on `cache_lens`: the host waits for nothing, and a CUDA graph stays right
while the lengths grow. Programs beyond a row's last split end at once.

Sources: Dao et al., Flash-Decoding for long-context inference, 2023; Kwon et al., PagedAttention, 2023 (arXiv:2309.06180).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import attention_pytorch, flops
from .activation import tanh
from .attention_common import LARGEST_HEAD_DIM, LOG2E, block_d
from .attention_splits import ANY_ALIGNMENT, NOT_SPECIALIZED, key_range, plan_combine
from .cpu import converts
from .dot import dot
from .launch import Gpu, LaunchPlan, allow_tf32, cdiv, empty_contiguous, gpu_of, next_power_of_2
from .library import call, register, register_autocast
from .triton_compat import tl, triton
from .tuned import tuned_plan
from .validate import (
    require_floating,
    require_int32,
    require_kernel_dtype,
    require_same_device,
    require_shape,
    require_tensors,
)

TILE_BYTES = 16384
"""Of k, and of v, in one tile: 8 16-byte loads of each for a thread of 4 warps (4 on AMD, whose warps are twice as wide)."""

MAX_TILE_HEADS = 32
"""Query heads in one tile: with head_dim 256, 64 of them spill on sm_80. More heads on one kv head (MQA) read it again."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""What a long context at batch 1 is split into; sm_80 holds two at a time (72 KB of shared memory each), so none waits for
another. Together they keep 64 KB and more in flight, where an H200 needs 36 KB an SM (4.8 TB/s at 1 us)."""


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def attention_decode_kernel(
    p_q, p_k, p_v, p_out, p_cache_lens, p_key_start, p_block_table,
    q_stride_b, q_stride_h, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, table_stride, max_len, window, splits, scale, softcap, STATS,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One split: its sum of p v and, `STATS` elements behind the first of them, the largest score and the sum of p.

    Not the log of that sum added to the score: where scores are large float32 would round it. With STATS None the split is
    the only one, and what it writes the result.
    """
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    if PDL:  # before anything is read: see streaming.py
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Splits are neighbours: a CPU's thread has a run of programs, and those of short rows have their work in the first split.
    i_split = tl.program_id(0) % splits
    i_heads = tl.program_id(0) // splits
    i_b = (i_heads // (KV_HEADS * HEAD_BLOCKS)).to(tl.int64)
    i_kv = i_heads // HEAD_BLOCKS % KV_HEADS
    start, end, split_keys = key_range(p_cache_lens, p_key_start, i_b, max_len, window, MAX_SPLITS, BLOCK_N)
    first = start + i_split * split_keys
    if (first >= end) & (i_split > 0):  # the first split always writes: a row without keys gets its zeros from it
        return

    o_group = i_heads % HEAD_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    o_h = (i_kv * GROUP + o_group)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    m_q = (o_group < GROUP)[:, None] & m_d[None, :]
    b_q = tl.load(
        p_q + i_b * q_stride_b + o_h.to(tl.int64) * q_stride_h + o_d[None, :] * q_stride_d, mask=m_q, other=0.0
    )

    p_k += i_kv.to(tl.int64) * k_stride_h + o_d[:, None] * k_stride_d
    p_v += i_kv.to(tl.int64) * v_stride_h + o_d[None, :] * v_stride_d
    if p_block_table is None:
        p_k += i_b * k_stride_b
        p_v += i_b * v_stride_b
    else:
        p_block_table += i_b * table_stride

    b_max = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    for start_n in range(first, tl.minimum(first + split_keys, end), BLOCK_N):
        o_n = start_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        if p_block_table is None:
            o_k = o_n.to(tl.int64) * k_stride_n
            o_v = o_n.to(tl.int64) * v_stride_n
        else:  # entries of the table beyond the row's keys may be garbage: not read
            # unsigned: a shift and an `and` a key, where a signed division takes five instructions on a CPU
            o_page, o_token = (o_n.to(tl.uint32) // PAGE).to(tl.int64), (o_n.to(tl.uint32) % PAGE).to(tl.int64)
            i_block = tl.load(p_block_table + o_page, mask=m_n, other=0).to(tl.int64)
            o_k = i_block * k_stride_b + o_token * k_stride_n
            o_v = i_block * v_stride_b + o_token * v_stride_n
        # what lies beyond the row's keys may be NaN: not read, as 0 * NaN would still be NaN
        b_k = tl.load(p_k + o_k[None, :], mask=m_d[:, None] & m_n[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        b_v = tl.load(p_v + o_v[:, None], mask=m_n[:, None] & m_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]

        b_s = dot(b_q, b_k, None, INPUT_PRECISION) * scale  # [BLOCK_H, BLOCK_N]
        if softcap is not None:
            b_s = softcap * tanh(b_s / softcap)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # finite: the first key of a tile is always one of the row's
        alpha = tl.exp2((b_max - b_new) * LOG2E)
        b_p = tl.exp2((b_s - b_new[:, None]) * LOG2E)  # the difference first: it is exact where it matters
        b_sum = b_sum * alpha + tl.sum(b_p, 1)
        acc = dot(b_p.to(b_v.dtype), b_v, acc * alpha[:, None], INPUT_PRECISION)
        b_max = b_new

    # [batch, heads, splits]; a result without splits has the same layout
    o_out = (i_b * (KV_HEADS * GROUP) + o_h) * splits + i_split
    if STATS is None:
        acc = acc / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]  # no keys: 0 / 1
    else:
        p_stats = p_out + STATS + 2 * o_out
        tl.store(p_stats, b_max[:, None], mask=(o_group < GROUP)[:, None])
        tl.store(p_stats + 1, b_sum[:, None], mask=(o_group < GROUP)[:, None])
    tl.store(p_out + o_out * HEAD_DIM + o_d[None, :], acc, mask=m_q)


def plan_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, out: Tensor, *,
    key_start: Tensor | None = None, block_table: Tensor | None = None, scale: float, window: int | None = None,
    softcap: float | None = None, allow_tf32: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """The splits and, if the cache may need more than one, the kernel that combines them."""
    batch, heads, _, head_dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    max_len = page if block_table is None else page * block_table.shape[1]
    window = None if window is None else min(window, max_len)
    group = heads // kv_heads
    block_h = min(MAX_TILE_HEADS, max(16, next_power_of_2(group)))
    columns = block_d(head_dim)
    block_n = max(16, min(128, TILE_BYTES // (columns * q.element_size())))
    if gpu.is_cpu:  # no row is padded, and what a tile costs beside its keys is shared by more of them
        block_h, block_n = min(MAX_TILE_HEADS, next_power_of_2(group)), 256
    head_blocks = kv_heads * cdiv(group, block_h)
    per_multiprocessor = PROGRAMS_PER_MULTIPROCESSOR
    # float32 without TF32 has no tensor cores: 4 warps spill (924 bytes a thread on sm_90), 8 do not
    num_warps = 8 if q.dtype == torch.float32 and gpu.is_nvidia else 4
    # One tile is loaded while another is computed on. NVIDIA: two buffers for 3 stages, and for 5 if the addresses
    # of k and v wait for the block table; AMD: one in LDS (64 KB would be all of it) and one in registers for 2.
    num_stages = 3 if gpu.is_nvidia else 2
    # by the heads alone, not by batch, length or paging: a row's bits must not depend on those
    if tuned := tuned_plan("attention_decode", gpu, q.dtype, (heads, kv_heads, head_dim)):
        block_n, per_multiprocessor = tuned["block_n"], tuned["programs_per_multiprocessor"]
        num_warps, num_stages = tuned["num_warps"], tuned["num_stages"]
    max_splits = cdiv(per_multiprocessor * gpu.multiprocessors, head_blocks)
    splits = max(1, min(max_splits, cdiv(max_len if window is None else window, block_n)))

    partial, outputs = out, None
    if splits > 1:  # one buffer: a second takes the host 1.3 us
        outputs = batch * heads * splits * head_dim
        partial = q.new_empty((outputs + 2 * batch * heads * splits,), dtype=torch.float32)
    q_stride_b, q_stride_h, _, q_stride_d = q.stride()
    k_stride_b, k_stride_h, k_stride_n, k_stride_d = k_cache.stride()
    v_stride_b, v_stride_h, v_stride_n, v_stride_d = v_cache.stride()
    split = LaunchPlan(
        attention_decode_kernel,
        grid=(batch * head_blocks * splits,),
        arguments=dict(
            p_q=q, p_k=k_cache, p_v=v_cache, p_out=partial,
            p_cache_lens=cache_lens, p_key_start=key_start, p_block_table=block_table,
            q_stride_b=q_stride_b, q_stride_h=q_stride_h, q_stride_d=q_stride_d,
            k_stride_b=k_stride_b, k_stride_h=k_stride_h, k_stride_n=k_stride_n, k_stride_d=k_stride_d,
            v_stride_b=v_stride_b, v_stride_h=v_stride_h, v_stride_n=v_stride_n, v_stride_d=v_stride_d,
            table_stride=0 if block_table is None else block_table.stride(0),
            max_len=max_len, window=window, splits=splits, scale=scale, softcap=softcap, STATS=outputs,
        ),
        constants=dict(
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE=None if block_table is None else page,
            MAX_SPLITS=max_splits, BLOCK_H=block_h, BLOCK_N=block_n, BLOCK_D=columns,
            INPUT_PRECISION="tf32" if allow_tf32 else "ieee", PDL=gpu.has_pdl,
        ),
        num_warps=num_warps,
        num_stages=num_stages + (2 if block_table is not None and gpu.is_nvidia else 0),
        pdl=gpu.has_pdl,
    )  # fmt: skip
    if outputs is None:
        return [split]
    combine = plan_combine(
        partial, out, cache_lens, key_start, max_len=max_len, window=window, splits=splits, stats=outputs,
        max_splits=max_splits, block_n=block_n, gpu=gpu,
    )  # fmt: skip
    return [split, combine]


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for batch, heads, kv_heads, head_dim, max_len, window, page in (
        (1, 32, 8, 64, 8192, None, None),
        (32, 32, 8, 128, 131072, None, None),
        (1, 32, 8, 128, 32768, 4096, None),
        (32, 32, 8, 128, 131072, None, 16),
        (32, 32, 8, 64, 8192, None, 64),
    ):
        q = torch.empty(batch, heads, 1, head_dim, dtype=torch.bfloat16, device="meta")
        lens = torch.empty(batch, dtype=torch.int32, device="meta")
        pages = 1 if page is None else max_len // page
        cache = q.new_empty(batch * pages, kv_heads, max_len // pages, head_dim)
        table = None if page is None else lens.new_empty(batch, pages)
        shape = f"{batch}x{heads}/{kv_heads}x{head_dim} of {max_len}"
        shape += f" window {window}" * (window is not None) + f" page {page}" * (page is not None)
        for plan in plan_attention_decode(
            q, cache, cache, lens, q, block_table=table, scale=head_dim**-0.5, window=window, gpu=gpu
        ):
            yield shape, plan


def _kernel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, key_start: Tensor | None,
    block_table: Tensor | None, scale: float, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    require_kernel_dtype(q=q)
    out = _fake(q, k_cache, v_cache, cache_lens, key_start, block_table, scale, window, softcap)
    if not out.numel():
        return out
    for plan in plan_attention_decode(
        q, k_cache, v_cache, cache_lens.contiguous(), out, key_start=None if key_start is None else key_start.contiguous(),
        block_table=None if block_table is None else block_table.contiguous(), scale=scale, window=window,
        softcap=softcap, allow_tf32=allow_tf32(q), gpu=gpu_of(q.device),
    ):  # fmt: skip
        plan.launch()
    return out


def _pytorch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, key_start: Tensor | None,
    block_table: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    _require_one_dtype(q, k_cache, v_cache)
    return attention_pytorch.decode(q, k_cache, v_cache, cache_lens, key_start, block_table, *options)


def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, key_start: Tensor | None,
    block_table: Tensor | None, scale: float, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    _require_one_dtype(q, k_cache, v_cache)
    return empty_contiguous(q)


def _require_one_dtype(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Checked below autocast, which makes them agree."""
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(f"k_cache and v_cache must have q's dtype, {q.dtype}, got {k_cache.dtype} and {v_cache.dtype}")


def _require_lengths(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, key_start: Tensor | None,
    block_table: Tensor | None, *options: Any,
) -> None:  # fmt: skip
    """On a GPU the kernel cuts what is too long."""
    max_len = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    if (longest := max(cache_lens.tolist(), default=0)) > max_len:
        keys = "k_cache holds" if block_table is None else "block_table has room for"
        raise ValueError(f"cache_lens must be at most {max_len}, the keys that {keys}, got {longest}")


attention_decode_op = register(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lens, Tensor? key_start,"
    " Tensor? block_table, float scale, int? window, float? softcap) -> Tensor",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.attention_decode,
    pytorch_is_faster=converts, check=_require_lengths,
)  # fmt: skip
register_autocast(attention_decode_op)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    *,
    key_start: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one query a row over the keys of a KV cache, for the decoding steps of generation. Inference only.

    Args:
        q: (batch, heads, 1, head_dim), float16, bfloat16 or float32 (float64 on the CPU); head_dim up to 256.
        k_cache, v_cache: (batch, kv_heads, max_len, head_dim) with any strides, q's dtype; with `block_table`
            (blocks, kv_heads, block_size, head_dim). kv_heads divides heads: query head h reads kv head
            h // (heads // kv_heads). What lies beyond a row's keys may be anything, NaN too.
        cache_lens: (batch,) int32: row b attends to the keys j < cache_lens[b], of which there are at most max_len, or
            max_blocks * block_size. On the CPU more are an error; on a GPU, where looking would wait for the device, they
            count for that many.
        key_start: (batch,) int32: and to none before key_start[b], the padding of a left-padded batch.
        block_table: (batch, max_blocks) int32: key j of row b is entry j % block_size of the cache's block
            block_table[b, j // block_size]. Entries beyond the row's keys are not read.
        scale: of the logits; 1 / sqrt(head_dim) by default.
        window: and only to the last `window` keys before cache_lens[b].
        softcap: logits become softcap * tanh(logit / softcap), as in Gemma 2.

    Returns:
        (batch, heads, 1, head_dim), contiguous; 0 for a row without keys. The values of a row do not depend on the other
        rows, nor on max_len or paging: on a GPU, not by one bit.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, device or number does not fit; on the CPU, a cache length that the cache cannot hold.
        RuntimeError: an input requires a gradient and grad mode is on: use `attention`, or `torch.no_grad()`.

    Source: Flash-Decoding, Dao et al. 2023; arXiv:2309.06180.
    """

    def check() -> None:
        _check(q, k_cache, v_cache, cache_lens, key_start, block_table)
        _check_numbers(scale, window, softcap)

    if scale is None or torch.is_grad_enabled():  # which ask the tensors something
        check()
        if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
            raise RuntimeError("attention_decode has no gradient: use attention, or call it under torch.no_grad()")
    return call(
        attention_decode_op, q, k_cache, v_cache, cache_lens, key_start, block_table,
        q.shape[-1] ** -0.5 if scale is None else scale, window, softcap, check=check,
    )  # fmt: skip


def _check_numbers(scale: float | None, window: int | None, softcap: float | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    key_start: Tensor | None,
    block_table: Tensor | None,
) -> None:
    require_floating(q=q, k_cache=k_cache, v_cache=v_cache)
    require_tensors(cache_lens=cache_lens)
    require_same_device(
        q=q, k_cache=k_cache, v_cache=v_cache, cache_lens=cache_lens, key_start=key_start, block_table=block_table
    )
    require_int32(cache_lens=cache_lens, key_start=key_start, block_table=block_table)
    q_shape, k_shape = q.shape, k_cache.shape
    if len(q_shape) != 4 or q_shape[2] != 1:
        raise ValueError(f"q must have shape (batch, heads, 1, head_dim), got {tuple(q_shape)}")
    batch, heads, _, head_dim = q_shape
    if not 1 <= head_dim <= LARGEST_HEAD_DIM:
        raise ValueError(f"q's head_dim must be from 1 to {LARGEST_HEAD_DIM}, got {head_dim}")
    if len(k_shape) != 4 or k_shape[3] != head_dim or (block_table is None and k_shape[0] != batch):
        first, third = ("blocks", "block_size") if block_table is not None else (batch, "max_len")
        raise ValueError(f"k_cache must have shape ({first}, kv_heads, {third}, {head_dim}), got {tuple(k_shape)}")
    require_shape("v_cache", v_cache, k_shape)
    if k_shape[1] == 0 or heads % k_shape[1]:
        raise ValueError(f"k_cache's kv_heads must divide q's {heads} heads, got {k_shape[1]}")
    require_shape("cache_lens", cache_lens, (batch,))
    if key_start is not None:
        require_shape("key_start", key_start, (batch,))
    if block_table is None:
        return
    if block_table.ndim != 2 or block_table.shape[0] != batch:
        raise ValueError(f"block_table must have shape ({batch}, max_blocks), got {tuple(block_table.shape)}")
    if k_shape[2] == 0:
        raise ValueError(f"k_cache's blocks must hold at least one key, got shape {tuple(k_shape)}")
