"""LayerNorm, backward. With x_hat = (h - mean) * rstd and g = dy * weight:

    dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dsum
    dweight = sum over rows of dy * x_hat        dbias = sum over rows of dy

Rows up to 8k elements take one pass, in which a program walks over many rows with its parts of dweight and dbias in
registers; longer ones take two: the two means of each row, then tiles of columns. Either way float32 partials are added
by a second kernel in a fixed order: no atomics, the same bits every run.
"""

import torch
from torch import Tensor

from .launch import Gpu, LaunchPlan, as_rows, cdiv, empty_contiguous, gpu_of
from .library import register
from .rows import (
    BACKWARD_WHOLE_ROW_LIMIT,
    COLUMN_BLOCK,
    accumulation_dtype,
    cast,
    column_programs,
    contiguous,
    plan_sum_rows,
    row_programs,
    row_tile,
    rows_of_program,
)
from .triton_compat import tl, triton


@triton.jit
def layer_norm_backward_kernel(
    p_dy, p_dsum, p_h, p_weight, p_mean, p_rstd, p_dh, p_dweight_partial, p_dbias_partial,
    dy_stride, dsum_stride, h_stride, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IN_SHARES: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)[None, :]
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    first, end, step = rows_of_program(M, BLOCK_M, IN_SHARES)
    for start in range(first, end, step):
        o_m = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (o_m < M) & (o_n < N)
        b_dy = tl.load(p_dy + o_m * dy_stride + o_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        b_h = tl.load(p_h + o_m * h_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + o_m, mask=o_m < M, other=0.0)  # [BLOCK_M, 1]
        rstd = tl.load(p_rstd + o_m, mask=o_m < M, other=0.0)
        b_xhat = (b_h - mean) * rstd  # dy, and so g, is zero where the mask is not set
        if p_dweight_partial is not None:
            b_dweight += b_dy * b_xhat
        if p_dbias_partial is not None:
            b_dbias += b_dy
        b_g = b_dy
        if p_weight is not None:
            b_g = b_dy * b_weight
        mean_g = tl.sum(b_g, axis=1, keep_dims=True) / N
        mean_gx = tl.sum(b_g * b_xhat, axis=1, keep_dims=True) / N
        b_dh = rstd * (b_g - mean_g - b_xhat * mean_gx)
        if p_dsum is not None:
            b_dh += tl.load(p_dsum + o_m * dsum_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dh + o_m * N + o_n, b_dh, mask=mask)

    o_partial = tl.program_id(0).to(tl.int64) * N + o_n
    if p_dweight_partial is not None:
        tl.store(p_dweight_partial + o_partial, tl.sum(b_dweight, axis=0, keep_dims=True), mask=o_n < N)
    if p_dbias_partial is not None:
        tl.store(p_dbias_partial + o_partial, tl.sum(b_dbias, axis=0, keep_dims=True), mask=o_n < N)


@triton.jit
def layer_norm_backward_row_means_kernel(
    p_dy, p_h, p_weight, p_mean, p_rstd, p_mean_g, p_mean_gx, dy_stride, h_stride, N, BLOCK_N: tl.constexpr
):
    """mean(g) and mean(g * x_hat) of one long row."""
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    mean = tl.load(p_mean + i_m)
    rstd = tl.load(p_rstd + i_m)
    b_sum_g = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_sum_gx = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        mask = start + o_n < N
        b_g = tl.load(p_dy + i_m * dy_stride + start + o_n, mask=mask, other=0.0).to(tl.float32)
        b_h = tl.load(p_h + i_m * h_stride + start + o_n, mask=mask, other=0.0).to(tl.float32)
        if p_weight is not None:
            b_g *= tl.load(p_weight + start + o_n, mask=mask, other=0.0).to(tl.float32)
        b_sum_g += b_g
        b_sum_gx += b_g * ((b_h - mean) * rstd)
    tl.store(p_mean_g + i_m, tl.sum(b_sum_g) / N)
    tl.store(p_mean_gx + i_m, tl.sum(b_sum_gx) / N)


@triton.jit
def layer_norm_backward_columns_kernel(
    p_dy, p_dsum, p_h, p_weight, p_mean, p_rstd, p_mean_g, p_mean_gx, p_dh, p_dweight_partial, p_dbias_partial,
    dy_stride, dsum_stride, h_stride, M, N, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of columns of long rows: program (i_n, i_p) walks over every num_programs(1)-th row."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = o_n < N
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_n, mask=mask, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_N], dtype=tl.float32)
    for i_m in range(tl.program_id(1).to(tl.int64), M, tl.num_programs(1)):
        b_dy = tl.load(p_dy + i_m * dy_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        b_h = tl.load(p_h + i_m * h_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + i_m)
        b_xhat = (b_h - tl.load(p_mean + i_m)) * rstd
        if p_dweight_partial is not None:
            b_dweight += b_dy * b_xhat
        if p_dbias_partial is not None:
            b_dbias += b_dy
        b_g = b_dy
        if p_weight is not None:
            b_g = b_dy * b_weight
        b_dh = rstd * (b_g - tl.load(p_mean_g + i_m) - b_xhat * tl.load(p_mean_gx + i_m))
        if p_dsum is not None:
            b_dh += tl.load(p_dsum + i_m * dsum_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dh + i_m * N + o_n, b_dh, mask=mask)
    o_partial = tl.program_id(1).to(tl.int64) * N + o_n
    if p_dweight_partial is not None:
        tl.store(p_dweight_partial + o_partial, b_dweight, mask=mask)
    if p_dbias_partial is not None:
        tl.store(p_dbias_partial + o_partial, b_dbias, mask=mask)


def plan_layer_norm_backward(
    dy: Tensor, h: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, dh: Tensor, *, dsum: Tensor | None = None,
    dweight: Tensor | None = None, dbias: Tensor | None = None, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """Backward over rows (M, N), as launches in order; `dsum` is the gradient of x + residual, if it has one."""
    m, n = h.shape
    tile = row_tile(n, gpu, limit=BACKWARD_WHOLE_ROW_LIMIT)
    is_long = n > BACKWARD_WHOLE_ROW_LIMIT
    programs = column_programs(m, n, gpu) if is_long else row_programs(m, tile, gpu)
    dweight_partial, dbias_partial = (
        None if out is None else out.new_empty((programs, n), dtype=torch.float32) for out in (dweight, dbias)
    )
    inputs = dict(
        p_dy=dy, p_h=h, p_weight=weight, p_mean=mean, p_rstd=rstd, dy_stride=dy.stride(0), h_stride=h.stride(0), N=n
    )
    outputs = dict(
        p_dsum=dsum, p_dh=dh, p_dweight_partial=dweight_partial, p_dbias_partial=dbias_partial,
        dsum_stride=0 if dsum is None else dsum.stride(0), M=m,
    )  # fmt: skip
    if is_long:
        means = dict(p_mean_g=torch.empty_like(rstd), p_mean_gx=torch.empty_like(rstd))
        plans = [
            LaunchPlan(
                layer_norm_backward_row_means_kernel, (m,), inputs | means, dict(BLOCK_N=tile.block_n), tile.num_warps
            ),
            LaunchPlan(
                layer_norm_backward_columns_kernel,
                (cdiv(n, COLUMN_BLOCK), programs),
                inputs | outputs | means,
                dict(BLOCK_N=COLUMN_BLOCK),
            ),
        ]
    else:
        constants = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, IN_SHARES=gpu.is_cpu)
        plans = [LaunchPlan(layer_norm_backward_kernel, (programs,), inputs | outputs, constants, tile.num_warps)]
    for partial, out in ((dweight_partial, dweight), (dbias_partial, dbias)):
        if partial is not None and out is not None:
            plans.append(plan_sum_rows(partial, out))
    return plans


def _backward_kernel(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dh, dweight, dbias = _backward_fake(dy, dsum, h, weight, bias, mean, rstd, weight_grad, bias_grad)
    plans = plan_layer_norm_backward(
        as_rows(dy), as_rows(h), contiguous(weight), mean, rstd, dh,
        dsum=None if dsum is None else as_rows(dsum),
        dweight=dweight if weight_grad else None, dbias=dbias if bias_grad else None, gpu=gpu_of(h.device),
    )  # fmt: skip
    for plan in plans:
        plan.launch()
    return dh, dweight, dbias


def _backward_pytorch(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulation_dtype(h)
    w, b = (None if parameter is None else cast(parameter, dtype) for parameter in (weight, bias))
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        cast(dy, dtype), cast(h, dtype), h.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), w, b,
        [True, weight_grad, bias_grad],
    )  # fmt: skip
    if dsum is not None:
        dh += dsum
    return (
        dh.to(h.dtype),
        h.new_empty(0) if weight is None or not weight_grad else dweight.to(weight.dtype),
        h.new_empty(0) if bias is None or not bias_grad else dbias.to(bias.dtype),
    )


def _backward_fake(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        empty_contiguous(h),
        h.new_empty(0) if weight is None or not weight_grad else weight.new_empty(weight.shape),
        h.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape),
    )


layer_norm_backward_op = register(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool weight_grad, bool bias_grad) -> (Tensor dh, Tensor dweight, Tensor dbias)",
    kernel=_backward_kernel, pytorch=_backward_pytorch, fake=_backward_fake,
)  # fmt: skip
