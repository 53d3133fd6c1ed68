"""The matrix product of `linear`, with its epilogue: kernels and plans.

    y = act(x @ weight^T + bias) + residual          x (M, K), weight (N, K), float32 accumulation, rounded once

Up to 16 rows (decoding) the weight is all the traffic, 2NK bytes in bf16, and is read once. A program owns BLOCK_N weight
rows and streams them through a ring of NUM_STAGES asynchronous copies of 16 bytes a thread; where N alone gives too few
programs for the GPU, K is split, and a second kernel adds the float32 partials in a fixed order and does the epilogue. One
row of x is multiplied element by element, more go through the tensor cores with the weight as the left operand.

More rows: a tile of (BLOCK_M, BLOCK_N) a program, in an order that keeps the operands of GROUP_M rows of tiles in L2.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activate
from .cpu import has_large_products
from .dot import dot
from .launch import INTERPRETED, Gpu, LaunchPlan, cdiv, gpu_of, next_power_of_2
from .streaming import streaming_stages, wait_for_previous_kernel
from .torch_compat import has_onednn_linear, onednn_linear
from .triton_compat import tl, triton
from .tuned import tuned_plan

FEW_ROWS = 16
"""Up to as many rows of x (the least a tensor core takes) the weight is streamed."""

LARGEST_TILE = 2**20
"""Elements, of any kernel: Triton's limit."""

GROUP_M = 8
"""Rows of tiles that are worked on together."""


@triton.jit
def _epilogue(
    b_acc, o_m, o_n, p_bias, p_residual, p_preactivation, p_y, residual_stride, M, N, ACTIVATION: tl.constexpr
):
    """Bias, activation, residual and the store. `o_m` and `o_n` broadcast to `b_acc`'s shape, in either order."""
    mask = (o_m < M) & (o_n < N)
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if p_preactivation is not None:
        tl.store(p_preactivation + o_m * N + o_n, b_acc, mask=mask)
    if ACTIVATION is not None:
        b_acc = activate(b_acc, ACTIVATION)
    if p_residual is not None:
        b_acc += tl.load(p_residual + o_m * residual_stride + o_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + o_m * N + o_n, b_acc, mask=mask)


@triton.jit
def _halves(b_tile):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(b_tile, (b_tile.shape[0], 2, b_tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["M"])  # one binary for 2 to 16 rows
def linear_few_rows_kernel(
    p_x, p_weight, p_bias, p_residual, p_preactivation, p_y, p_partial,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, residual_stride, M, N, K, split_k,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i_n, i_split): BLOCK_N rows of the weight, `split_k` columns of it (a multiple of BLOCK_K)."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = o_row[:, None]
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    k_start = tl.program_id(1) * split_k
    if PDL:
        p_first = p_weight + k_start.to(tl.int64) * weight_stride_k
        wait_for_previous_kernel(
            p_first, o_row, o_row < N, weight_stride_n, weight_stride_k, K - k_start, BLOCK_K, NUM_STAGES
        )  # fmt: skip
    if BLOCK_M == 1:
        b_product = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    else:
        b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)

    for start in tl.range(k_start, min(k_start + split_k, K), BLOCK_K, num_stages=NUM_STAGES):
        o_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        p_w = p_weight + o_n * weight_stride_n + o_k[None, :] * weight_stride_k
        mask_w = o_n < N
        if not EVEN_K:
            mask_w = mask_w & (o_k < K)[None, :]
        b_w = tl.load(p_w, mask=mask_w, other=0.0)  # [BLOCK_N, BLOCK_K]
        if BLOCK_M == 1:
            b_x = tl.load(p_x + o_k * x_stride_k, mask=o_k < K, other=0.0)
            b_product += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
        else:
            p_xt = p_x + o_k[:, None] * x_stride_k + o_m * x_stride_m
            b_xt = tl.load(p_xt, mask=(o_k < K)[:, None] & (o_m < M), other=0.0)  # [BLOCK_K, BLOCK_M]
            b_acc = dot(b_w, b_xt, b_acc, INPUT_PRECISION)

    if BLOCK_M == 1:
        b_acc = tl.sum(b_product, axis=1, keep_dims=True)
    if p_partial is not None:
        p_split = p_partial + tl.program_id(1).to(tl.int64) * M * N
        tl.store(p_split + o_m * N + o_n, b_acc, mask=(o_m < M) & (o_n < N))
    else:
        _epilogue(b_acc, o_m, o_n, p_bias, p_residual, p_preactivation, p_y, residual_stride, M, N, ACTIVATION)


@triton.jit
def linear_add_splits_kernel(
    p_partial, p_bias, p_residual, p_preactivation, p_y, residual_stride, M, N,
    ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i_n, i_m): the sum of the partials of BLOCK_N elements of a row of y, and the epilogue."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    o_s = tl.arange(0, BLOCK_S)[:, None].to(tl.int64)
    o_m = tl.program_id(1) + tl.arange(0, 1)[:, None].to(tl.int64)
    p_row = p_partial + (o_s * M + o_m) * N + o_n  # [BLOCK_S, BLOCK_N]
    b_partial = tl.load(p_row, mask=(o_s < SPLITS) & (o_n < N), other=0.0)
    b_acc = tl.sum(b_partial, axis=0, keep_dims=True)
    _epilogue(b_acc, o_m, o_n, p_bias, p_residual, p_preactivation, p_y, residual_stride, M, N, ACTIVATION)


@triton.jit
def linear_kernel(
    p_x, p_weight, p_bias, p_residual, p_preactivation, p_y,
    x_stride_m, x_stride_k, weight_stride_n, weight_stride_k, residual_stride, M, N, K,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    i_tile = tl.program_id(0)
    first_m = i_tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    i_m = first_m + i_tile % (GROUP_M * tiles_n) % group_m
    i_n = i_tile % (GROUP_M * tiles_n) // group_m
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]

    o_k = tl.arange(0, BLOCK_K)
    p_a = p_x + o_m * x_stride_m + o_k[None, :].to(tl.int64) * x_stride_k  # [BLOCK_M, BLOCK_K]
    p_b = p_weight + o_n * weight_stride_n + o_k[:, None].to(tl.int64) * weight_stride_k  # [BLOCK_K, BLOCK_N]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        mask_a, mask_b = o_m < M, o_n < N
        if not EVEN_K:
            mask_a = mask_a & (o_k < K - start)[None, :]
            mask_b = mask_b & (o_k < K - start)[:, None]
        b_a = tl.load(p_a, mask=mask_a, other=0.0)
        b_b = tl.load(p_b, mask=mask_b, other=0.0)
        b_acc = dot(b_a, b_b, b_acc, INPUT_PRECISION)
        p_a += tl.full([], BLOCK_K, tl.int64) * x_stride_k
        p_b += tl.full([], BLOCK_K, tl.int64) * weight_stride_k

    if BLOCK_N == 256:  # a quarter at a time, or what the epilogue keeps beside the accumulator spills
        b_left, b_right = _halves(b_acc)
        o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, 64)[None, :]
        for b_half in tl.static_range(2):
            b_0, b_1 = _halves(b_left if b_half == 0 else b_right)
            _epilogue(b_0, o_m, o_n, p_bias, p_residual, p_preactivation, p_y, residual_stride, M, N, ACTIVATION)
            _epilogue(b_1, o_m, o_n + 64, p_bias, p_residual, p_preactivation, p_y, residual_stride, M, N, ACTIVATION)
            o_n += 128
    else:
        _epilogue(b_acc, o_m, o_n, p_bias, p_residual, p_preactivation, p_y, residual_stride, M, N, ACTIVATION)


class Tile(NamedTuple):
    """A program's tile of a matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


# A 128x256 accumulator is 128 registers a thread with 8 warps. 4-byte operands take half the depth in as many bytes.
_TILES = (Tile(128, 256, 64, 8), Tile(128, 128, 64, 8), Tile(64, 128, 64, 4), Tile(64, 64, 64, 4), Tile(64, 32, 128, 4))

# float32 products at full precision run on the ordinary units, which want their operands in registers.
_IEEE_TILES = (Tile(64, 64, 16, 4), Tile(32, 32, 32, 4))

# Operands that cannot be copied 16 bytes at a time pass through registers, element by element; with 4 warps they spill.
_UNALIGNED_TILES = (Tile(64, 64, 32, 8),)


# On a CPU a program packs its operands: the longer the sums and the larger the tile, the less that costs.
_CPU_TILE = Tile(128, 128, 256, 4)


@lru_cache(maxsize=4096)
def choose_tile(m: int, n: int, itemsize: int, ieee: bool, aligned: bool, gpu: Gpu) -> Tile:
    """The tile with the least estimated time: rounds of programs over the GPU, times the time of one.

    `ieee` is float32 at full precision, `aligned` says that operands can be copied 16 bytes at a time. A program's step
    multiplies block_m * block_n pairs and fetches block_m + block_n operands from L2. An operand is weighed as 64 pairs:
    an SM of sm_90 multiplies 2048 pairs of bf16 a clock and gets about 32 operands.
    """

    if gpu.is_cpu:
        return _CPU_TILE

    def estimate(tile: Tile) -> float:
        rounds = cdiv(cdiv(m, tile.block_m) * cdiv(n, tile.block_n), gpu.multiprocessors)
        return rounds * (tile.block_m * tile.block_n + 64 * (tile.block_m + tile.block_n))

    tile = min(_IEEE_TILES if ieee else _TILES if aligned else _UNALIGNED_TILES, key=estimate)
    return tile._replace(block_k=tile.block_k // 2) if itemsize == 4 and not ieee else tile


def _is_aligned(matrix: Tensor) -> bool:
    """Whether Triton will copy 16 bytes at a time: what it knows of a size or stride is whether 16 divides it."""
    if 1 not in matrix.stride():
        return False
    contiguous = 1 if matrix.stride(1) == 1 else 0
    start = matrix.storage_offset() * matrix.element_size()
    return matrix.shape[contiguous] % 16 == 0 and matrix.stride(1 - contiguous) % 16 == 0 and start % 16 == 0


def _stages(operand_bytes: int, gpu: Gpu) -> int:
    """Depth of the pipeline: up to 4 tiles of operands in flight; on AMD one, while the next is in registers."""
    return max(2, min(4, gpu.shared_bytes // operand_bytes)) if gpu.is_nvidia else 2


def plan_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, *,
    activation: str | None = None, preactivation: Tensor | None = None, allow_tf32: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """y (M, N) from x (M, K) and weight (N, K), which may have any strides, as launches in order.

    `residual` (M, N) has contiguous rows and may be `y` itself, which then is added to; `preactivation` (M, N) is
    written where it is given. Both outputs are contiguous, and may have M cut into more dimensions.
    """
    (m, k), n = x.shape, weight.shape[0]
    (x_stride_m, x_stride_k), (weight_stride_n, weight_stride_k) = x.stride(), weight.stride()
    epilogue = dict(
        p_bias=bias, p_residual=residual, p_preactivation=preactivation, p_y=y,
        residual_stride=0 if residual is None else residual.stride(0), M=m, N=n,
    )  # fmt: skip
    operands = dict(
        p_x=x, p_weight=weight, x_stride_m=x_stride_m, x_stride_k=x_stride_k,
        weight_stride_n=weight_stride_n, weight_stride_k=weight_stride_k, K=k,
    )  # fmt: skip
    ieee = x.dtype == torch.float32 and not allow_tf32
    constants = dict(ACTIVATION=activation, INPUT_PRECISION="tf32" if allow_tf32 else "ieee")
    if m <= FEW_ROWS:
        return _plan_few_rows(operands, epilogue, constants, gpu)
    aligned = _is_aligned(x) and _is_aligned(weight)
    tuned = tuned_plan("linear", gpu, x.dtype, (next_power_of_2(m), n, k)) if aligned and not ieee else None
    if tuned is None:
        tile = choose_tile(m, n, x.element_size(), ieee, aligned, gpu)
        if gpu.is_cpu:  # no zeros are packed, and few rows of them multiplied
            block_m, block_k = max(32, next_power_of_2(m)), max(32, next_power_of_2(k))
            tile = tile._replace(block_m=min(tile.block_m, block_m), block_k=min(tile.block_k, block_k))
        stages = _stages((tile.block_m + tile.block_n) * tile.block_k * x.element_size(), gpu)
    else:
        tile = Tile(tuned["block_m"], tuned["block_n"], tuned["block_k"], tuned["num_warps"])
        stages = tuned["num_stages"]
    tile_constants = dict(
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, EVEN_K=k % tile.block_k == 0
    )
    return [
        LaunchPlan(
            linear_kernel,
            grid=(cdiv(m, tile.block_m) * cdiv(n, tile.block_n),),
            arguments=operands | epilogue,
            constants=constants | tile_constants,
            num_warps=tile.num_warps,
            num_stages=stages,
        )
    ]


# Rows of the weight, and bytes of a row, of one tile: 8 or 4 KB for one row of x, 16 to 4 KB for the tensor cores. The largest is
# taken that gives three quarters of the multiprocessors a program: the fewer programs, the less often x is read.
_ONE_ROW_TILES = ((8, 1024), (4, 1024))
_FEW_ROWS_TILES = ((64, 256), (32, 256), (16, 256))


def _cpu_tile(n: int, k: int, itemsize: int, gpu: Gpu) -> tuple[int, int]:
    """As many rows of the weight as leave each core two programs: a program packs x anew. Sums stay in registers for as much of a
    row as a tile has, 16 KB: longer sums in 16 lanes lose digits (of 20000 float32 they had 2.9 times PyTorch's error)."""
    row_bytes = min(16384, itemsize * max(16, next_power_of_2(k)))
    blocks = [block for block in (256, 128, 64, 32) if block * row_bytes <= LARGEST_TILE * itemsize]
    return next((block for block in blocks if cdiv(n, block) >= 2 * gpu.multiprocessors), 16), row_bytes


def _plan_few_rows(
    operands: dict[str, Any], epilogue: dict[str, Any], constants: dict[str, Any], gpu: Gpu
) -> list[LaunchPlan]:
    m, n, k = epilogue["M"], epilogue["N"], operands["K"]
    itemsize = operands["p_x"].element_size()
    block_m, tiles = (1, _ONE_ROW_TILES) if m == 1 else (FEW_ROWS, _FEW_ROWS_TILES)
    block_n, row_bytes = next((t for t in tiles if 4 * cdiv(n, t[0]) >= 3 * gpu.multiprocessors), tiles[-1])
    if gpu.is_cpu:
        block_m, (block_n, row_bytes) = max(2, next_power_of_2(m)), _cpu_tile(n, k, itemsize, gpu)
    block_k = row_bytes // itemsize
    programs = cdiv(n, block_n)
    # Only where N is too small for the GPU K is split: a split costs a second launch. It is at least 4 tiles long.
    splits = max(1, min(2 * gpu.multiprocessors // programs, k // (4 * block_k), 16)) if programs else 1
    if gpu.is_cpu or 4 * programs >= 3 * gpu.multiprocessors:
        splits = 1
    stages = None
    if tuned := tuned_plan("linear_few_rows", gpu, operands["p_x"].dtype, (block_m, n, k)):
        block_n, block_k, splits, stages = tuned["block_n"], tuned["block_k"], tuned["splits"], tuned["num_stages"]
        row_bytes, programs = block_k * itemsize, cdiv(n, block_n)
    split_k = cdiv(cdiv(k, splits), block_k) * block_k
    splits = cdiv(k, split_k) if k else 1
    partial = None if splits == 1 else epilogue["p_y"].new_empty((splits, m, n), dtype=torch.float32)
    streaming = LaunchPlan(
        linear_few_rows_kernel,
        grid=(programs, splits),
        arguments=operands | epilogue | dict(p_partial=partial, split_k=split_k),
        constants=constants | dict(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN_K=k % block_k == 0,
            PDL=gpu.has_pdl,
            NUM_STAGES=stages or streaming_stages(programs * splits, block_n * row_bytes, block_m * row_bytes, gpu),
        ),
        pdl=gpu.has_pdl,
    )  # fmt: skip
    if partial is None:
        return [streaming]
    add_splits = LaunchPlan(
        linear_add_splits_kernel,
        grid=(cdiv(n, 256), m),
        arguments=dict(p_partial=partial) | epilogue,
        constants=dict(
            ACTIVATION=constants["ACTIVATION"], SPLITS=splits, BLOCK_S=next_power_of_2(splits), BLOCK_N=256, PDL=gpu.has_pdl
        ),
        pdl=gpu.has_pdl,
    )  # fmt: skip
    return [streaming, add_splits]


def is_onednns(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply x (..., K) by weight (N, K): more than `FEW_ROWS` rows of float32, which PyTorch gives to MKL by itself.

    From the layers of a model of 0.9M to those of LLaMA 8B, 128 to 1024 rows, two cores of an AMD EPYC (Zen 4): x @ weight^T and dy @ weight
    at 156 to 214 GFLOP/s, MKL at 103 to 191. dy^T @ x it copies first (58 to 196, MKL 156 to 198).
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() <= FEW_ROWS * x.shape[-1] or not weight.numel():
        return False
    return x.stride(-1) == 1 and has_onednn_linear()


def library_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K)^T + bias (N,), by the libraries of PyTorch."""
    if is_onednns(x, weight):
        if bias is not None:
            bias = bias.contiguous()  # oneDNN takes no stride of it, and says nothing
        y: Tensor = onednn_linear(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,), a plain product inside an op: the library's, or ours where a CPU is faster with that.

    `out` (M, N) is contiguous.
    """
    if a.device.type == "cpu" and not INTERPRETED and has_large_products(a.dtype):
        y = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
        for plan in plan_linear(a, b.t(), bias, None, y, gpu=gpu_of(a.device)):
            plan.launch()
        return y
    if out is None:
        return library_linear(a, b.t(), bias)
    if b.shape[1] < b.shape[0] and is_onednns(
        a, b.t()
    ):  # its result lies in new memory: a copy costs less than a was read for
        return out.copy_(library_linear(a, b.t(), bias))
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
