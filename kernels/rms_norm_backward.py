"""RMSNorm, backward. With x_hat = h * rstd, g = dy * (weight + offset) and c = mean(g * x_hat):

    dh = rstd * (g - x_hat * c) + dsum        dweight = sum over rows of dy * x_hat

Rows up to 8k elements take one pass, in which a program walks over many rows with its part of dweight in registers; longer
ones take two: c of each row, then tiles of columns. Either way float32 partials of dweight are added by a second kernel in
a fixed order: no atomics, the same bits every run.
"""

import torch
from torch import Tensor

from .launch import Gpu, LaunchPlan, as_rows, cdiv, empty_contiguous, gpu_of
from .library import register
from .rows import (
    BACKWARD_WHOLE_ROW_LIMIT,
    COLUMN_BLOCK,
    column_programs,
    contiguous,
    plan_sum_rows,
    row_programs,
    row_tile,
    rows_of_program,
)
from .triton_compat import tl, triton


@triton.jit
def rms_norm_backward_kernel(
    p_dy, p_dsum, p_h, p_weight, p_rstd, p_dh, p_dweight_partial, dy_stride, dsum_stride, h_stride, M, N, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IN_SHARES: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)[None, :]
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_n, mask=o_n < N, other=0.0).to(tl.float32) + offset
    b_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    first, end, step = rows_of_program(M, BLOCK_M, IN_SHARES)
    for start in range(first, end, step):
        o_m = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (o_m < M) & (o_n < N)
        b_dy = tl.load(p_dy + o_m * dy_stride + o_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        b_h = tl.load(p_h + o_m * h_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + o_m, mask=o_m < M, other=0.0)  # [BLOCK_M, 1]
        b_xhat = b_h * rstd
        if p_dweight_partial is not None:
            b_dweight += b_dy * b_xhat
        b_g = b_dy
        if p_weight is not None:
            b_g = b_dy * b_weight
        c = tl.sum(b_g * b_xhat, axis=1, keep_dims=True) / N
        b_dh = rstd * (b_g - b_xhat * c)
        if p_dsum is not None:
            b_dh += tl.load(p_dsum + o_m * dsum_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dh + o_m * N + o_n, b_dh, mask=mask)

    if p_dweight_partial is not None:
        p_partial = p_dweight_partial + tl.program_id(0).to(tl.int64) * N + o_n
        tl.store(p_partial, tl.sum(b_dweight, axis=0, keep_dims=True), mask=o_n < N)


@triton.jit
def rms_norm_backward_row_mean_kernel(
    p_dy, p_h, p_weight, p_rstd, p_mean, dy_stride, h_stride, N, offset, BLOCK_N: tl.constexpr
):
    """c = mean(dy * (weight + offset) * x_hat) of one long row."""
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    rstd = tl.load(p_rstd + i_m)
    b_c = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        mask = start + o_n < N
        b_g = tl.load(p_dy + i_m * dy_stride + start + o_n, mask=mask, other=0.0).to(tl.float32)
        b_h = tl.load(p_h + i_m * h_stride + start + o_n, mask=mask, other=0.0).to(tl.float32)
        if p_weight is not None:
            b_g *= tl.load(p_weight + start + o_n, mask=mask, other=0.0).to(tl.float32) + offset
        b_c += b_g * b_h * rstd
    tl.store(p_mean + i_m, tl.sum(b_c) / N)


@triton.jit
def rms_norm_backward_columns_kernel(
    p_dy, p_dsum, p_h, p_weight, p_rstd, p_mean, p_dh, p_dweight_partial, dy_stride, dsum_stride, h_stride, M, N, offset,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns of long rows: program (i_n, i_p) walks over every num_programs(1)-th row."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = o_n < N
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_n, mask=mask, other=0.0).to(tl.float32) + offset
    b_dweight = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i_m in range(tl.program_id(1).to(tl.int64), M, tl.num_programs(1)):
        b_dy = tl.load(p_dy + i_m * dy_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + i_m)
        b_xhat = tl.load(p_h + i_m * h_stride + o_n, mask=mask, other=0.0).to(tl.float32) * rstd
        if p_dweight_partial is not None:
            b_dweight += b_dy * b_xhat
        b_g = b_dy
        if p_weight is not None:
            b_g = b_dy * b_weight
        b_dh = rstd * (b_g - b_xhat * tl.load(p_mean + i_m))
        if p_dsum is not None:
            b_dh += tl.load(p_dsum + i_m * dsum_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dh + i_m * N + o_n, b_dh, mask=mask)
    if p_dweight_partial is not None:
        tl.store(p_dweight_partial + tl.program_id(1).to(tl.int64) * N + o_n, b_dweight, mask=mask)


def plan_rms_norm_backward(
    dy: Tensor, h: Tensor, weight: Tensor | None, rstd: Tensor, dh: Tensor, *,
    dsum: Tensor | None = None, dweight: Tensor | None = None, offset: float, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """Backward over rows (M, N), as launches in order; `dsum` is the gradient of x + residual, if it has one."""
    m, n = h.shape
    tile = row_tile(n, gpu, limit=BACKWARD_WHOLE_ROW_LIMIT)
    is_long = n > BACKWARD_WHOLE_ROW_LIMIT
    programs = column_programs(m, n, gpu) if is_long else row_programs(m, tile, gpu)
    partial = None if dweight is None else dweight.new_empty((programs, n), dtype=torch.float32)
    inputs = dict(
        p_dy=dy, p_h=h, p_weight=weight, p_rstd=rstd, dy_stride=dy.stride(0), h_stride=h.stride(0), N=n, offset=offset
    )
    outputs = dict(
        p_dsum=dsum, p_dh=dh, p_dweight_partial=partial, dsum_stride=0 if dsum is None else dsum.stride(0), M=m
    )
    if is_long:
        mean = dict(p_mean=torch.empty_like(rstd))
        plans = [
            LaunchPlan(
                rms_norm_backward_row_mean_kernel, (m,), inputs | mean, dict(BLOCK_N=tile.block_n), tile.num_warps
            ),
            LaunchPlan(
                rms_norm_backward_columns_kernel,
                (cdiv(n, COLUMN_BLOCK), programs),
                inputs | outputs | mean,
                dict(BLOCK_N=COLUMN_BLOCK),
            ),
        ]
    else:
        constants = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, IN_SHARES=gpu.is_cpu)
        plans = [LaunchPlan(rms_norm_backward_kernel, (programs,), inputs | outputs, constants, tile.num_warps)]
    if partial is not None and dweight is not None:
        plans.append(plan_sum_rows(partial, dweight))
    return plans


def _backward_kernel(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    dh, dweight = _backward_fake(dy, dsum, h, weight, rstd, offset, weight_grad)
    plans = plan_rms_norm_backward(
        as_rows(dy), as_rows(h), contiguous(weight), rstd, dh,
        dsum=None if dsum is None else as_rows(dsum),
        dweight=dweight if weight_grad else None, offset=offset, gpu=gpu_of(h.device),
    )  # fmt: skip
    for plan in plans:
        plan.launch()
    return dh, dweight


def _backward_pytorch(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    dy, rstd = dy.to(rstd.dtype), rstd.unsqueeze(-1)
    x_hat = h * rstd
    g = dy if weight is None else dy * (weight.to(dy.dtype) + offset)
    dh = (g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * rstd
    if dsum is not None:
        dh += dsum
    if not weight_grad:
        return dh.to(h.dtype).contiguous(), h.new_empty(0)
    assert weight is not None
    return dh.to(h.dtype).contiguous(), (dy * x_hat).sum_to_size(weight.shape).to(weight.dtype)


def _backward_fake(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    if not weight_grad:
        return empty_contiguous(h), h.new_empty(0)
    assert weight is not None
    return empty_contiguous(h), weight.new_empty(weight.shape)


rms_norm_backward_op = register(
    "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor rstd, float offset, bool weight_grad)"
    " -> (Tensor dh, Tensor dweight)",
    kernel=_backward_kernel, pytorch=_backward_pytorch, fake=_backward_fake,
)  # fmt: skip
