"""What the ops that work row by row share: how rows are cut into tiles, and the sum over rows that ends a weight gradient."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import Gpu, LaunchPlan, cdiv, next_power_of_2
from .triton_compat import tl, triton
from .tuned import tuned_plan

WHOLE_ROW_LIMIT = 16384
"""The longest row that one program keeps in registers: 32 elements a thread with 16 warps. Longer rows are read in tiles."""

BACKWARD_WHOLE_ROW_LIMIT = WHOLE_ROW_LIMIT // 2
"""The same in a backward pass, where a program also keeps its parts of weight gradients: at 16k RMSNorm spilled 160 to 308 bytes."""

LONG_ROW_BLOCK = 8192
"""Tile of a row longer than that: 16 elements a thread with 16 warps, two 16-byte loads in flight in bf16."""

LONG_ROW_BLOCK_ON_CPU = 1024
"""The same on a CPU, where what a tile is computed into lies in the 32 KB of a core's first cache: softmax of 64 rows of 128256
took 4.8 ms with tiles of 8192, and takes 3.9."""

COLUMN_BLOCK = 1024
"""Columns of a long row that a program of a backward pass owns: 8 elements a thread with 4 warps (16 spilled on sm_100)."""


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes 0.7 us on the host where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


@dataclass(frozen=True)
class RowTile:
    """A tile of `block_m` rows of `block_n` elements, worked on by `num_warps` warps."""

    block_m: int
    block_n: int
    num_warps: int


@functools.lru_cache
def row_tile(n: int, gpu: Gpu, *, limit: int = WHOLE_ROW_LIMIT) -> RowTile:
    """The tile for rows of `n` elements: short rows share a program (2048 elements), rows past `limit` are cut."""
    long_block = LONG_ROW_BLOCK_ON_CPU if gpu.is_cpu else LONG_ROW_BLOCK
    block_n = long_block if n > limit else next_power_of_2(max(1, n))
    block_m = 1 if n > limit else max(1, 2048 // block_n)
    # 16 elements a thread are two 16-byte loads in bf16; past 16 warps a thread would be left with 64 registers.
    threads = block_m * block_n // 16
    return RowTile(block_m, block_n, max(1, min(16, threads // gpu.warp_size)))


def forward_tile(op: str, n: int, dtype: torch.dtype, gpu: Gpu) -> RowTile:
    """The tile of a forward pass: the tuned one, or the arithmetic's."""
    if (tuned := tuned_plan(op, gpu, dtype, (n,))) is None:
        return row_tile(n, gpu)
    return RowTile(tuned["block_m"], tuned["block_n"], tuned["num_warps"])


def row_programs(m: int, tile: RowTile, gpu: Gpu) -> int:
    """How many programs walk over `m` rows in a backward pass: each leaves one float32 partial of the weight gradient."""
    return min(cdiv(m, tile.block_m), 2 * gpu.multiprocessors)


def column_programs(m: int, n: int, gpu: Gpu) -> int:
    """The same where `n` is cut into blocks of COLUMN_BLOCK: how many programs share the rows of one block."""
    return min(m, cdiv(8 * gpu.multiprocessors, cdiv(n, COLUMN_BLOCK)))


def contiguous(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias as the kernels read it: with stride 1."""
    return None if parameter is None else parameter.contiguous()


@triton.jit
def rows_of_program(M, BLOCK_M: tl.constexpr, IN_SHARES: tl.constexpr):
    """The first row of a program that walks over many, where it ends, and its step.

    A GPU's programs run side by side and read neighbouring tiles. A core of a CPU runs one program at a time: IN_SHARES its
    tiles are neighbours, and are read 1.3 times as fast as every fourth row of 8 KB.
    """
    if IN_SHARES:
        share = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(0)) * BLOCK_M
        first = tl.program_id(0) * share
        return first, tl.minimum(first + share, M), BLOCK_M
    return tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M


@triton.jit
def sum_rows_kernel(p_partial, p_out, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(p_partial + o_p.to(tl.int64) * N + o_n, mask=(o_p < P) & (o_n < N), other=0.0)
    tl.store(p_out + o_n, tl.sum(total, axis=0, keep_dims=True), mask=o_n < N)


def plan_sum_rows(partial: Tensor, out: Tensor) -> LaunchPlan:
    """`out[n] = sum over p of partial[p, n]`, float32 partials, in a fixed order, rounded once to `out`'s dtype."""
    programs, n = partial.shape
    return LaunchPlan(
        sum_rows_kernel,
        grid=(cdiv(n, 64),),
        arguments=dict(p_partial=partial, p_out=out, P=programs, N=n),
        constants=dict(BLOCK_P=32, BLOCK_N=64),
    )
