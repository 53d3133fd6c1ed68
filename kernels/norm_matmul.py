"""RMSNorm and the matrix product after it, in one launch, for the few rows of a decoding step: what `norm_qkv_rope` and
`norm_swiglu` share.

x (M, K) with M up to 16, weight (N, K). The weight is all the traffic, 2NK bytes in bf16, and is read once. Its rows go in
pairs that are needed together: the two elements of a head that RoPE turns (elements of a head that it does not turn, and
those of v, are paired alike), or a row of gate and its row of up. A program owns BLOCK_P pairs, the rows of the first
elements above those of the second, and streams their 2 * BLOCK_P rows through a ring of NUM_STAGES asynchronous copies of 16
bytes a thread. One row of x is multiplied element by element, more go through the tensor cores with the weight as the left
operand, padded to 16 rows: the same binary for 2 to 16, so a row's bits depend on that row alone. One row alone adds up in
another order, and its bits differ from those it has among others.

The norm: every program reads all of x anyway, so it adds up x^2 along the way and scales the sums by rstd at the end.

    rms_norm(x) @ weight^T = rstd * ((x * norm_weight) @ weight^T)

For the tensor cores x * norm_weight is rounded once to the weight's dtype, where norm-then-round rounds x * rstd * norm_weight:
one rounding in either, of the same relative size, so the error rule holds (rstd, the bias, RoPE and SwiGLU are float32 here,
where the plain ops round between them). With one row nothing is rounded before the sum. In float16 x * norm_weight could
overflow where the normed row does not: there rows that need tensor cores are normed by a launch of their own.

On a CPU a program takes whole rows of the weight (`_project_whole_rows`): its caches hold x, and sums stay in registers.

Nothing is kept for a backward pass: inference only. Source: arXiv:1910.07467 (RMSNorm).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dot import dot
from .launch import Gpu, LaunchPlan, cdiv, next_power_of_2
from .linear import require_dtype
from .matmul import FEW_ROWS, LARGEST_TILE
from .rms_norm import plan_rms_norm
from .streaming import streaming_stages
from .triton_compat import tl, triton
from .tuned import tuned_plan
from .validate import require_floating, require_same_device, require_shape


@triton.jit
def pair_rows(i_block, pairs, half, BLOCK_P: tl.constexpr):
    """Rows of the i_block-th tile, counted from the first pair's: [2 * BLOCK_P], and which of them exist."""
    o_row = tl.arange(0, 2 * BLOCK_P)
    o_p = i_block.to(tl.int64) * BLOCK_P + o_row % BLOCK_P
    return o_p + (o_row // BLOCK_P).to(tl.int64) * half, o_p < pairs


@triton.jit
def project_pairs(
    p_x, p_norm, p_weight, p_second, p_bias, p_second_bias, first, i_block, pairs,
    x_stride, weight_stride_n, weight_stride_k, M, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr, WHOLE_ROWS: tl.constexpr,
):  # fmt: skip
    """(norm(x) @ weight^T + bias)^T for a block of pairs of rows of the weight: the first elements of the pairs, and the second ones.

    The first elements are `pairs` (64 bits wide) rows from row `first` on, the second ones as many behind them, or the same rows of
    `p_second`, a weight of its own with the same strides. Both results are [BLOCK_P, BLOCK_M] in float32. Without `p_norm` x is taken
    as it is.
    """
    if WHOLE_ROWS:
        return _project_whole_rows(
            p_x, p_norm, p_weight, p_second, p_bias, p_second_bias, first, i_block, pairs,
            x_stride, weight_stride_n, weight_stride_k, M, K, eps, BLOCK_M, BLOCK_P, BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
    return _project_tiles(
        p_x, p_norm, p_weight, p_second, p_bias, p_second_bias, first, i_block, pairs,
        x_stride, weight_stride_n, weight_stride_k, M, K, eps,
        BLOCK_M, BLOCK_P, BLOCK_K, EVEN_K, NUM_STAGES, INPUT_PRECISION,
    )  # fmt: skip


@triton.jit
def _of_pairs(p_first, p_second, o_n, stride, BLOCK_P: tl.constexpr):
    """Addresses of the rows `o_n` (`pair_rows`): those of the second elements in `p_second`, where there is one."""
    if p_second is not None:
        p_first = tl.where(tl.arange(0, 2 * BLOCK_P) < BLOCK_P, p_first, p_second)
    return p_first + o_n * stride


@triton.jit
def _project_tiles(
    p_x, p_norm, p_weight, p_second, p_bias, p_second_bias, first, i_block, pairs,
    x_stride, weight_stride_n, weight_stride_k, M, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    half = pairs
    if p_second is not None:
        half = pairs * 0
    o_row, m_n = pair_rows(i_block, pairs, half, BLOCK_P)
    o_n = first + o_row
    p_rows = _of_pairs(p_weight, p_second, o_n, weight_stride_n, BLOCK_P)[:, None]
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    if BLOCK_M == 1:
        b_product = tl.zeros([2 * BLOCK_P, BLOCK_K], dtype=tl.float32)
        b_squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    else:
        b_acc = tl.zeros([2 * BLOCK_P, BLOCK_M], dtype=tl.float32)
        b_squares = tl.zeros([BLOCK_K, BLOCK_M], dtype=tl.float32)
        if p_norm is not None:  # loaded a tile ahead: 256 bytes are too few for a copy of 4 bytes a thread
            o_first = tl.arange(0, BLOCK_K)
            b_norm = tl.load(p_norm + o_first, mask=o_first < K, other=0.0)

    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        o_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        m_w = m_n[:, None]
        if not EVEN_K:
            m_w = m_w & m_k[None, :]
        p_w = p_rows + o_k[None, :] * weight_stride_k
        b_w = tl.load(p_w, mask=m_w, other=0.0)  # [2 * BLOCK_P, BLOCK_K]
        if BLOCK_M == 1:
            b_x = tl.load(p_x + o_k, mask=m_k, other=0.0).to(tl.float32)
            if p_norm is not None:
                b_squares += b_x * b_x
                b_x *= tl.load(p_norm + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_product += b_w.to(tl.float32) * b_x[None, :]
        else:
            m_x = m_k[:, None] & (o_m < M)
            b_x = tl.load(p_x + o_k[:, None] + o_m * x_stride, mask=m_x, other=0.0)  # [BLOCK_K, BLOCK_M]
            if p_norm is not None:
                b_wide = b_x.to(tl.float32)
                b_squares += b_wide * b_wide
                b_x = (b_wide * b_norm.to(tl.float32)[:, None]).to(b_w.dtype)
                b_norm = tl.load(p_norm + o_k + BLOCK_K, mask=o_k + BLOCK_K < K, other=0.0)
            b_acc = dot(b_w, b_x, b_acc, INPUT_PRECISION)

    if BLOCK_M == 1:
        b_acc = tl.sum(b_product, axis=1, keep_dims=True)
    if p_norm is not None:
        b_acc *= tl.rsqrt(tl.sum(b_squares, axis=0) / K + eps)
    if p_bias is not None:
        p_bias_rows = _of_pairs(p_bias, p_second_bias, o_n, 1, BLOCK_P)
        b_acc += tl.load(p_bias_rows, mask=m_n, other=0.0).to(tl.float32)[:, None]
    return tl.split(tl.permute(tl.reshape(b_acc, (2, BLOCK_P, BLOCK_M)), (1, 2, 0)))


@triton.jit
def _project_whole_rows(
    p_x, p_norm, p_weight, p_second, p_bias, p_second_bias, first, i_block, pairs,
    x_stride, weight_stride_n, weight_stride_k, M, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """With all of K in one tile, for a CPU."""
    o_m, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * x_stride + o_k[None, :], mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_K]
    b_rstd = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    if p_norm is not None:
        b_wide = b_x.to(tl.float32)
        b_rstd = tl.rsqrt(tl.sum(b_wide * b_wide, axis=1) / K + eps)
        b_norm = tl.load(p_norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        # zeros where a mask says so: rows that are not there are not multiplied
        b_x = tl.where(m_x, b_wide * b_norm[None, :], 0.0).to(p_weight.dtype.element_ty)
    o_n = first + i_block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_n = o_n < first + pairs
    b_first = _project_rows(
        b_x, b_rstd, p_weight, p_bias, o_n, m_n, weight_stride_n, weight_stride_k, K, BLOCK_K, INPUT_PRECISION
    )
    o_second = o_n
    if p_second is None:
        o_second = o_n + pairs
        p_second = p_weight
        p_second_bias = p_bias
    b_second = _project_rows(
        b_x,
        b_rstd,
        p_second,
        p_second_bias,
        o_second,
        m_n,
        weight_stride_n,
        weight_stride_k,
        K,
        BLOCK_K,
        INPUT_PRECISION,
    )
    return b_first, b_second


@triton.jit
def _project_rows(
    b_x, b_rstd, p_weight, p_bias, o_n, m_n, weight_stride_n, weight_stride_k, K,
    BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
    p_w = p_weight + o_n[:, None] * weight_stride_n + o_k * weight_stride_k
    b_w = tl.load(p_w, mask=m_n[:, None] & (o_k < K), other=0.0)  # [rows, BLOCK_K]
    b_acc = dot(b_w, tl.trans(b_x), None, INPUT_PRECISION) * b_rstd[None, :]
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    return b_acc


class Tile(NamedTuple):
    """A program's pairs of weight rows, and the bytes of a row in one stage."""

    block_p: int
    row_bytes: int


# One row: 8 KB of weight a stage either way; 32 float32 products a thread. x and norm_weight come from L2 in every program,
# two bytes for each two bytes of a weight row: 16 rows a program make that 1/8 of the traffic.
_ONE_ROW_TILES: tuple[Tile, ...] = (Tile(8, 512), Tile(4, 1024))

# 64 rows, which sm_90's own tensor core instruction takes, or 32. (Rows of 512 bytes took 255 registers and spilled.)
_TILES: tuple[Tile, ...] = (Tile(32, 256), Tile(16, 256))


def plan_pairs(
    op: str, kernel: Any, groups: int, pairs: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any],
    weight: Tensor, x: Tensor, norm_weight: Tensor | None, *, eps: float, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """The launches for `groups` (heads) that have `pairs` of weight rows each, in sequences that share no tile."""
    m, k = x.shape
    plans = []
    if x.dtype == torch.float16 and (m > 1 or gpu.is_cpu) and norm_weight is not None:
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        rstd = x.new_empty(m, dtype=torch.float32)
        plans.append(plan_rms_norm(x, norm_weight, normed, rstd, eps=eps, offset=0.0, gpu=gpu))
        x, norm_weight = normed, None

    def programs(tile: Tile) -> int:
        return groups * sum(cdiv(length, tile.block_p) for length in pairs)

    tiles, wanted = (_ONE_ROW_TILES, 2) if m == 1 else (_TILES, 1)
    block_m = 1 if m == 1 else FEW_ROWS
    if gpu.is_cpu:
        row_bytes = x.element_size() * max(32, next_power_of_2(k))
        most = min(2 * max(pairs), LARGEST_TILE * x.element_size() // row_bytes + 1)
        blocks = [block_p for block_p in (128, 64, 32) if block_p < most]
        tiles, wanted = tuple(Tile(block_p, row_bytes) for block_p in (*blocks, 16)), 2
        block_m = max(2, next_power_of_2(m))
    tile = next((tile for tile in tiles if programs(tile) >= wanted * gpu.multiprocessors), tiles[-1])
    stages = None
    if tuned := tuned_plan(op, gpu, x.dtype, (block_m, groups, sum(pairs), k)):
        tile, stages = Tile(tuned["block_p"], tuned["row_bytes"]), tuned["num_stages"]
    block_k = tile.row_bytes // x.element_size()
    plans.append(
        LaunchPlan(
            kernel,
            grid=(programs(tile),),
            arguments=arguments | dict(
                p_x=x, p_norm=norm_weight, p_weight=weight, x_stride=x.stride(0),
                weight_stride_n=weight.stride(0), weight_stride_k=weight.stride(1), M=m, K=k, eps=eps,
            ),
            constants=constants | dict(
                BLOCK_M=block_m, BLOCK_P=tile.block_p, BLOCK_K=block_k, EVEN_K=k % block_k == 0,
                WHOLE_ROWS=gpu.is_cpu, PDL=gpu.has_pdl,
                NUM_STAGES=stages or streaming_stages(
                    programs(tile), 2 * tile.block_p * tile.row_bytes, max(2, block_m) * tile.row_bytes, gpu
                ),
            ),
            # float32 without TF32 has no tensor cores, and 4 warps spill
            num_warps=8 if m > 1 and constants["INPUT_PRECISION"] == "ieee" and x.element_size() == 4 else 4,
            pdl=gpu.has_pdl,
        )
    )  # fmt: skip
    return plans


def require_no_gradient(op: str, *tensors: Tensor | None) -> None:
    """Of ops that keep nothing for a backward pass."""
    if torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op} has no gradient: use the separate ops, or call it under torch.no_grad()")


def require_norm_product(x: Tensor, norm_weight: Tensor, bias: dict[str, Tensor | None], **others: Tensor) -> None:
    """What these ops ask of x, the norm's weight, the bias by its name, and the others: the matrix first, then the caches."""
    biases = {name: tensor for name, tensor in bias.items() if tensor is not None}
    given = others | biases
    require_floating(x=x, norm_weight=norm_weight, **given)
    require_same_device(x=x, norm_weight=norm_weight, **given)
    require_dtype(x, norm_weight=norm_weight, **given)
    if x.ndim < 2 or x.shape[-1] == 0 or x.numel() > FEW_ROWS * x.shape[-1]:
        raise ValueError(f"x must be (rows, hidden) with at most {FEW_ROWS} rows, got {tuple(x.shape)}")
    require_shape("norm_weight", norm_weight, x.shape[-1:])
    name, weight = next(iter(others.items()))
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{name} must have shape (rows, {x.shape[-1]}), got {tuple(weight.shape)}")
    for name, tensor in biases.items():
        require_shape(name, tensor, weight.shape[:1])
