"""What the attention kernels share: which keys a query may attend to, and how tiles are cut and ordered.

Every kernel sees one geometry, whatever the arguments were. A program works on the query rows q_lo <= i < q_hi and the
keys k_lo <= j < k_hi of one sequence: the whole of a batch row, its key range, or a packed sequence. Query i stands at
position i + shift with shift = k_hi - q_hi, so that the last query stands on the last key, and may attend to key j if

    k_lo <= j < k_hi    j <= i + shift (causal)    i + shift - window < j < i + shift + window (window)

and the boolean mask, if there is one, says so.

A program owns a tile of rows (queries, or keys in the kernel for dk and dv) and walks over tiles of columns. Columns that
none of its rows sees are not touched. The walk has two loops, the first with a mask over the tiles on the borders, the
second without: at head_dim 128 on sm_90 that is 559 instead of 776 instructions a tile. Border tiles are half as large,
which keeps the mask's own registers from being spilled. Each loop stands in an `if`: where ptxas sees that a loop
may run zero times it waits after every single HGMMA (its warning C7515).

On a CPU (IN_SHARES) border tiles are a quarter of the others. Of a causal one, rows that see none of its columns come last and are
made zeros, which no product there multiplies.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu import multiplies
from .launch import Gpu, LaunchPlan, allow_tf32, cdiv, next_power_of_2
from .rows import contiguous
from .triton_compat import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SECTION_BYTES = 16 * 2**20
"""What the programs that run at the same time should share: it fits in half of the L2 of an A100 or H100."""

LARGEST_HEAD_DIM = 256
"""Of `attention` and `attention_decode`: what their tiles are tuned for."""

NOT_SPECIALIZED = ["HEADS", "SEQ_Q", "SEQ_K", "SEQUENCES", "TILES", "PAIRS", "SECTION", "ROWS", "window"]
"""Sizes that change from call to call: no binary of its own for a multiple of 16 or a 1."""


class Pattern(NamedTuple):
    """Who may attend to whom, and how scores are made: the last arguments of the ops, in their order."""

    mask: Tensor | None
    key_start: Tensor | None
    key_end: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    causal: bool
    window: int | None
    scale: float
    softcap: float | None


PATTERN_SCHEMA = (
    "Tensor? mask, Tensor? key_start, Tensor? key_end, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " bool causal, int? window, float scale, float? softcap"
)


@triton.jit
def next_tile(TILES, PAIRS, SECTION, IN_SHARES: tl.constexpr):
    """The tile and the (batch row, head) pair of this program.

    Tiles follow each other in order, each for SECTION pairs before the next: what a section reads again and again stays
    in the L2, and where long tiles come first the short ones fill the end of the launch. On a CPU a thread runs a share of the
    programs that follow each other: from both ends in turns, so that all shares have as much to do.
    """
    i_program = tl.program_id(0)
    i_section = i_program // (TILES * SECTION)
    first = i_section * SECTION
    width = tl.minimum(SECTION, PAIRS - first)
    rest = i_program - i_section * (TILES * SECTION)
    i_tile = rest // width
    if IN_SHARES:
        i_tile = tl.where(i_tile % 2 == 0, i_tile // 2, TILES - 1 - i_tile // 2)
    return i_tile, first + rest % width


@triton.jit
def sequence_of_tile(p_cu_seqlens, i_tile, SEQUENCES, BLOCK: tl.constexpr):
    """The packed sequence that tile `i_tile` belongs to, and the tile's number in it.

    Sequence s owns the tiles from cu_seqlens[s] // BLOCK + s on, which are at least as many as it needs. What follows the
    last sequence counts as one more.
    """
    i_s = -1
    for first in range(0, SEQUENCES + 1, 128):
        o_s = first + tl.arange(0, 128)
        b_start = tl.load(p_cu_seqlens + o_s, mask=o_s <= SEQUENCES, other=0)
        i_s += tl.sum(((b_start // BLOCK + o_s <= i_tile) & (o_s <= SEQUENCES)).to(tl.int32))
    return i_s, i_tile - (tl.load(p_cu_seqlens + i_s) // BLOCK + i_s)


@triton.jit
def sequence_bounds(p_key_start, p_key_end, p_cu_q, p_cu_k, i_b, i_s, SEQUENCES, SEQ_Q, SEQ_K):
    """q_lo, q_hi, k_lo, k_hi of batch row `i_b`, or of packed sequence `i_s`."""
    if p_cu_q is not None:
        inside = i_s < SEQUENCES
        q_lo = tl.load(p_cu_q + i_s)
        q_hi = tl.load(p_cu_q + i_s + 1, mask=inside, other=SEQ_Q)
        k_lo = tl.load(p_cu_k + i_s)
        k_hi = tl.load(p_cu_k + i_s + 1, mask=inside, other=0)
    else:
        q_lo = 0
        q_hi = SEQ_Q
        k_lo = 0
        k_hi = SEQ_K
        if p_key_start is not None:
            k_lo = tl.minimum(tl.maximum(tl.load(p_key_start + i_b), 0), SEQ_K)
        if p_key_end is not None:
            k_hi = tl.minimum(tl.maximum(tl.load(p_key_end + i_b), 0), SEQ_K)
    return q_lo, q_hi, k_lo, k_hi


@triton.jit
def tile_of_queries(
    p_key_start, p_key_end, p_cu_q, p_cu_k, HEADS, SEQ_Q, SEQ_K, SEQUENCES, TILES, PAIRS, SECTION,
    IN_SHARES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The batch row, head and first query of this program, where the queries end, and the bounds of their keys."""
    i_tile, i_pair = next_tile(TILES, PAIRS, SECTION, IN_SHARES)
    i_tile = TILES - 1 - i_tile  # the last queries of a causal sequence have the most keys
    i_b, i_h = (i_pair // HEADS).to(tl.int64), (i_pair % HEADS).to(tl.int64)
    i_s = 0
    if p_cu_q is not None:
        i_s, i_tile = sequence_of_tile(p_cu_q, i_tile, SEQUENCES, BLOCK_M)
    q_lo, q_hi, k_lo, k_hi = sequence_bounds(p_key_start, p_key_end, p_cu_q, p_cu_k, i_b, i_s, SEQUENCES, SEQ_Q, SEQ_K)
    return i_b, i_h, q_lo + i_tile * BLOCK_M, q_hi, k_lo, k_hi


@triton.jit
def key_tiles(
    i_lo, i_hi, k_lo, k_hi, shift, window, p_mask,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, MASKED_BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys that queries i_lo <= i < i_hi attend to, as `split_tiles` cuts them."""
    lo = k_lo
    hi = k_hi
    full_lo = k_lo
    full_hi = k_hi
    if CAUSAL:
        hi = tl.minimum(k_hi, i_hi + shift)
        full_hi = tl.minimum(k_hi, i_lo + shift + 1)
    elif window is not None:
        hi = tl.minimum(k_hi, i_hi + shift + window - 1)
        full_hi = tl.minimum(k_hi, i_lo + shift + window)
    if window is not None:
        lo = tl.maximum(k_lo, i_lo + shift - window + 1)
        full_lo = tl.maximum(lo, i_hi + shift - window)
    return split_tiles(lo, full_lo, full_hi, hi, p_mask, BLOCK, MASKED_BLOCK)


@triton.jit
def query_tiles(
    j_lo, j_hi, q_lo, q_hi, shift, window, p_mask, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, MASKED_BLOCK: tl.constexpr
):
    """lo <= a <= b <= hi for the keys j_lo <= j < j_hi, as `key_tiles` for queries."""
    lo = q_lo
    hi = q_hi
    full_lo = q_lo
    full_hi = q_hi
    if CAUSAL:
        lo = tl.maximum(q_lo, j_lo - shift)
        full_lo = tl.maximum(lo, j_hi - 1 - shift)
    elif window is not None:
        lo = tl.maximum(q_lo, j_lo - shift - window + 1)
        full_lo = tl.maximum(lo, j_hi - shift - window)
    if window is not None:
        hi = tl.minimum(q_hi, j_hi - 1 - shift + window)
        full_hi = tl.minimum(hi, j_lo - shift + window)
    return split_tiles(lo, full_lo, full_hi, hi, p_mask, BLOCK, MASKED_BLOCK)


@triton.jit
def split_tiles(lo, full_lo, full_hi, hi, p_mask, BLOCK: tl.constexpr, MASKED_BLOCK: tl.constexpr):
    """lo <= a <= b <= hi with a..b inside of full_lo..full_hi, where every row of the program sees every column.

    lo..a is made of whole tiles of MASKED_BLOCK, a..b of BLOCK. Only the tiles of lo..a and b..hi need a mask; all do
    where a boolean mask may speak in any tile.
    """
    hi = tl.maximum(lo, hi)
    if p_mask is not None:
        a = hi
        b = hi
    else:
        a = tl.minimum(lo + tl.cdiv(full_lo - lo, MASKED_BLOCK) * MASKED_BLOCK, hi)
        b = a + tl.maximum(full_hi - a, 0) // BLOCK * BLOCK
    return lo, a, b, hi


@triton.jit
def count_tiles(lo, a, b, hi, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The tiles of a..b or, if MASKED, of lo..a and b..hi."""
    return tl.cdiv(a - lo, BLOCK) + tl.cdiv(hi - b, BLOCK) if MASKED else (b - a) // BLOCK


@triton.jit
def tile_start(i, lo, a, b, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Where tile `i` of those starts."""
    if MASKED:
        start = lo + i * BLOCK
        start = tl.where(start < a, start, start - a + b)
    else:
        start = a + i * BLOCK
    return start


@triton.jit
def visible(o_q, o_k, k_hi, window, CAUSAL: tl.constexpr):
    """Whether queries at positions `o_q` may attend to keys `o_k`: one is a column, the other a row.

    It may be true for what does not exist: a query past the end, with nothing to store, or a key past the end of those.
    """
    if CAUSAL:
        m = o_k <= o_q
        if window is not None:
            m &= o_k > o_q - window
    else:
        m = o_k < k_hi
        m &= o_q < k_hi
        if window is not None:
            m &= (o_k > o_q - window) & (o_k < o_q + window)
    return m


@triton.jit
def load_mask(p_mask, o_m, o_n, mask_stride_m, mask_stride_n, q_hi, k_hi):
    """The boolean mask for query rows `o_m` and keys `o_n`: one is a column, the other a row."""
    p = p_mask + o_m.to(tl.int64) * mask_stride_m + o_n.to(tl.int64) * mask_stride_n
    return tl.load(p, mask=(o_m < q_hi) & (o_n < k_hi), other=0) != 0


@triton.jit
def may_attend(
    p_mask, o_m, o_n, mask_stride_m, mask_stride_n, q_hi, k_hi, shift, window, CAUSAL: tl.constexpr
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: `visible` and the boolean mask, if there is one, for query rows `o_m` and keys `o_n`."""
    m = visible((o_m + shift)[:, None], o_n[None, :], k_hi, window, CAUSAL)
    if p_mask is not None:
        m &= load_mask(p_mask, o_m[:, None], o_n[None, :], mask_stride_m, mask_stride_n, q_hi, k_hi)
    return m


@triton.jit
def load_rows(p, m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """A [rows, BLOCK_D] tile with 0 past HEAD_DIM and, if MASKED, in rows where `m_rows` ([rows, 1]) is false."""
    m_d = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if MASKED and HEAD_DIM < BLOCK_D:
        b = tl.load(p, mask=m_rows & m_d, other=0.0)
    elif MASKED:
        b = tl.load(p, mask=m_rows, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        b = tl.load(p, mask=m_d, other=0.0)
    else:
        b = tl.load(p)
    return b


@triton.jit
def store_rows(p, b, m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a [rows, BLOCK_D] tile, rounded once, where `m_rows` ([rows, 1]) is true."""
    tl.store(p, b.to(p.dtype.element_ty), mask=m_rows & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM))


@dataclass(frozen=True)
class Tile:
    """A program's tile of `block_m` queries and `block_n` keys, with its warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CPU_TILE = Tile(128, 128, 4, 1)
"""Keys are packed for as many queries as they can be: 64 x 64 took 1.1 to 1.3 times as long at 2048 keys."""


def pytorch_is_faster_on_cpu(q: Tensor, k: Tensor) -> bool:
    """Where PyTorch's attention beats ours on a CPU: in dtypes that it does not multiply, and for few queries, whose keys grow
    by one a call, so that no two calls have the same shapes."""
    return q.shape[-2] < 32 or not multiplies(q.dtype)


def tile_for(tiles: dict[str, tuple[Tile, Tile, Tile]], head_dim: int, itemsize: int, gpu: Gpu) -> Tile:
    """From a table with three tiles for each kind of GPU: head_dim up to 64, 128 and 256."""
    if gpu.is_cpu:
        return CPU_TILE
    if itemsize == 4:
        kind = "float32"
    elif not gpu.is_nvidia:
        kind = "gfx942"
    elif gpu.compute_capability == 90:
        kind = "sm_90"
    else:
        kind = "sm_100" if 100 <= gpu.compute_capability < 120 else "sm_80"
    return tiles[kind][0 if head_dim <= 64 else 1 if head_dim <= 128 else 2]


def fit_stages(tile: Tile, head_dim: int, itemsize: int, resident_rows: int, streamed_rows: int, gpu: Gpu) -> Tile:
    """`tile` with the stages that shared memory holds: the tables suit the largest GPU of a kind, sm_86 has 99 KB."""
    stages = (gpu.shared_bytes // (block_d(head_dim) * itemsize) - resident_rows) // streamed_rows
    return replace(tile, num_stages=max(1, min(tile.num_stages, stages))) if gpu.is_nvidia else tile


def block_d(head_dim: int) -> int:
    """The columns of a tile: a power of two, and at least what a tensor core takes."""
    return max(16, next_power_of_2(head_dim))


def read_pattern(options: tuple[Any, ...]) -> Pattern:
    """The last arguments of an op, with vectors as the kernels read them: with stride 1."""
    mask, key_start, key_end, cu_seqlens_q, cu_seqlens_k, *rest = options
    cu_seqlens_q = contiguous(cu_seqlens_q)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else contiguous(cu_seqlens_k)
    return Pattern(mask, contiguous(key_start), contiguous(key_end), cu_seqlens_q, cu_seqlens_k, *rest)


def as_batch(x: Tensor) -> Tensor:
    """(batch, heads, seq, head_dim) with contiguous rows: packed (heads, total, head_dim) is a batch of one row."""
    x = x.unsqueeze(0) if x.ndim == 3 else x
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_rows(x: Tensor) -> Tensor:
    """Uninitialised, of `x`'s shape, in memory as (batch, seq, heads, head_dim), or (total, heads, head_dim) if packed."""
    heads, seq, head_dim = x.shape[-3:]
    strides = (head_dim, heads * head_dim, 1)
    return x.new_empty_strided(x.shape, strides if x.ndim == 3 else (seq * heads * head_dim, *strides))


def empty_lse(q: Tensor) -> Tensor:
    """Uninitialised, float64: one number for each query of each head. (`new_empty` takes a list 0.8 us faster than a torch.Size.)

    At scores of 1000 float32 would round lse by 3e-5, and e^(s - lse) in backward by as much of itself: 256 eps.
    """
    *sizes, _ = q.shape
    return q.new_empty(sizes, dtype=torch.float64)


def as_empty_rows(x: Tensor) -> Tensor:
    """`x` in memory as `empty_rows` makes it: copied only if it lies otherwise."""
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


def plan_tiles(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, arguments: dict[str, Any], *,
    rows: int, pairs: int, pair_bytes: int, over_keys: bool, tile: Tile, gpu: Gpu,
) -> LaunchPlan:  # fmt: skip
    """The plan of an attention kernel, with `arguments` (added to) beside those that all of them take.

    `rows` are what programs share in tiles, of each of `pairs` (batch row, head); `pair_bytes` is what the programs of a
    pair read again and again, and `over_keys` says whether that is keys. `q, k, v` are as `as_batch` makes them.
    """
    batch, heads, seq_q, head_dim = q.shape
    _, kv_heads, seq_k, _ = k.shape
    mask, key_start, key_end, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap = pattern
    block, walked = (tile.block_m, tile.block_n) if over_keys else (tile.block_n, tile.block_m)
    sequences, tiles = 0, cdiv(rows, block)
    if cu_seqlens_q is not None:
        sequences = cu_seqlens_q.numel() - 1
        tiles = rows // block + sequences + 1
    if mask is not None:
        mask = mask.expand(batch, heads, seq_q, seq_k)
    if window is not None and window >= max(seq_q, seq_k):
        window = None  # it reaches over everything, and would only make border tiles
    (q_b, q_h, q_s, _), (k_b, k_h, k_s, _), (v_b, v_h, v_s, _) = q.stride(), k.stride(), v.stride()
    mask_b, mask_h, mask_m, mask_n = (0, 0, 0, 0) if mask is None else mask.stride()
    # spelled out: names made in a loop take the host 1 us more
    arguments |= {
        "p_q": q, "p_k": k, "p_v": v, "p_mask": mask, "p_key_start": key_start, "p_key_end": key_end,
        "p_cu_q": cu_seqlens_q, "p_cu_k": cu_seqlens_k,
        "q_stride_b": q_b, "q_stride_h": q_h, "q_stride_s": q_s, "k_stride_b": k_b, "k_stride_h": k_h, "k_stride_s": k_s,
        "v_stride_b": v_b, "v_stride_h": v_h, "v_stride_s": v_s,
        "mask_stride_b": mask_b, "mask_stride_h": mask_h, "mask_stride_m": mask_m, "mask_stride_n": mask_n,
        "HEADS": heads, "SEQ_Q": seq_q, "SEQ_K": seq_k, "SEQUENCES": sequences, "TILES": tiles, "PAIRS": pairs,
        "SECTION": 1 if gpu.is_cpu else max(1, min(pairs, SECTION_BYTES // max(1, pair_bytes))),
        "scale": scale, "softcap": softcap, "window": window,
    }  # fmt: skip
    return LaunchPlan(
        kernel,
        grid=(tiles * pairs,),
        arguments=arguments,
        constants=dict(
            CAUSAL=causal, GROUP=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d(head_dim),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MASKED_BLOCK=max(16, walked // (4 if gpu.is_cpu else 2)),
            IN_SHARES=gpu.is_cpu, INPUT_PRECISION="tf32" if allow_tf32(q) else "ieee",
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
