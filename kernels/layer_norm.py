"""LayerNorm, alone or with the residual add before it, in one pass.

    h = x + residual                                       (rounded to x's dtype, as an unfused model does)
    y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias   (float32, rounded once)

Forward: a program owns BLOCK_M rows. Rows up to 16k elements stay in registers: in bf16 2N bytes are read and 2N written
a row (4N and 4N with the residual). A longer row is read again for y, from its end, which is still in L2. 8N FLOPs a row:
memory bound.

The variance is that of h - mean, never E[h^2] - E[h]^2, and both come with the correction mean(h - mean), which float32
rounding keeps from being zero: rows far from zero lose no digits. Long rows take Welford's recurrence in each lane, and
join the lanes by Chan's formula.

Backward, with x_hat = (h - mean) * rstd and g = dy * weight:

    dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dsum
    dweight = sum over rows of dy * x_hat        dbias = sum over rows of dy

Kept for backward: h, and mean and rstd in float32. Rows up to 8k elements take one pass, in which a program walks over
many rows with its parts of dweight and dbias in registers; longer ones take two: the two means of each row, then tiles of
columns. Either way float32 partials are added by a second kernel in a fixed order: no atomics, the same bits every run.

Papers: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450); Chan, Golub and LeVeque, Updating Formulae and
a Pairwise Algorithm for Computing Sample Variances, 1979.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Gpu, LaunchPlan, as_rows, cdiv, empty_contiguous, gpu_of
from .library import below_autograd, register, register_autograd
from .rows import (
    BACKWARD_WHOLE_ROW_LIMIT,
    COLUMN_BLOCK,
    WHOLE_ROW_LIMIT,
    accumulation_dtype,
    column_programs,
    contiguous,
    plan_sum_rows,
    row_programs,
    row_tile,
)
from .validate import (
    require_floating,
    require_floating_or_none,
    require_kernel_dtype,
    require_same,
    require_same_device,
    require_shape,
)


@triton.jit
def layer_norm_kernel(
    p_x, p_residual, p_weight, p_bias, p_y, p_sum, p_mean, p_rstd, x_stride, residual_stride, M, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    mask = (o_m < M) & (o_n < N)

    b_h = tl.load(p_x + o_m * x_stride + o_n, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_m * residual_stride + o_n, mask=mask, other=0.0)
        b_h = (b_h.to(tl.float32) + b_residual.to(tl.float32)).to(b_h.dtype)
        tl.store(p_sum + o_m * N + o_n, b_h, mask=mask)
    b_h = b_h.to(tl.float32)
    mean = tl.sum(b_h, axis=1, keep_dims=True) / N  # [BLOCK_M, 1]
    b_h = tl.where(mask, b_h - mean, 0.0)
    correction = tl.sum(b_h, axis=1, keep_dims=True) / N
    variance = tl.sum(b_h * b_h, axis=1, keep_dims=True) / N - correction * correction
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    tl.store(p_mean + o_m, mean + correction, mask=o_m < M)
    tl.store(p_rstd + o_m, rstd, mask=o_m < M)

    b_y = (b_h - correction) * rstd
    if p_weight is not None:
        b_y *= tl.load(p_weight + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(p_y + o_m * N + o_n, b_y, mask=mask)


@triton.jit
def layer_norm_long_row_kernel(
    p_x, p_residual, p_weight, p_bias, p_y, p_sum, p_mean, p_rstd, x_stride, residual_stride, M, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    b_mean = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_square = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of squared distances from the lane's mean
    for start in range(0, N, BLOCK_N):
        mask = start + o_n < N
        b_h = tl.load(p_x + i_m * x_stride + start + o_n, mask=mask, other=0.0)
        if p_residual is not None:
            b_residual = tl.load(p_residual + i_m * residual_stride + start + o_n, mask=mask, other=0.0)
            b_h = (b_h.to(tl.float32) + b_residual.to(tl.float32)).to(b_h.dtype)
            tl.store(p_sum + i_m * N + start + o_n, b_h, mask=mask)
        b_h = b_h.to(tl.float32)
        b_delta = tl.where(mask, b_h - b_mean, 0.0)
        b_mean += b_delta * (BLOCK_N / (start + BLOCK_N))  # one over what the lane has seen
        b_square += b_delta * (b_h - b_mean)
    b_count = ((N + BLOCK_N - 1 - o_n) // BLOCK_N).to(tl.float32)
    mean = tl.sum(b_count * b_mean) / N
    b_mean -= mean
    correction = tl.sum(b_count * b_mean) / N
    variance = tl.sum(b_square + b_count * b_mean * b_mean) / N - correction * correction
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    tl.store(p_mean + i_m, mean + correction)
    tl.store(p_rstd + i_m, rstd)

    if p_residual is not None:
        tl.debug_barrier()  # the sums that this program wrote are read back below, perhaps by another of its threads
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for distance in range(0, N, BLOCK_N):
        start = last - distance
        mask = start + o_n < N
        if p_residual is not None:
            b_h = tl.load(p_sum + i_m * N + start + o_n, mask=mask, other=0.0)
        else:
            b_h = tl.load(p_x + i_m * x_stride + start + o_n, mask=mask, other=0.0)
        b_y = (b_h.to(tl.float32) - mean - correction) * rstd
        if p_weight is not None:
            b_y *= tl.load(p_weight + start + o_n, mask=mask, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_y += tl.load(p_bias + start + o_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_y + i_m * N + start + o_n, b_y, mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    p_dy, p_dsum, p_h, p_weight, p_mean, p_rstd, p_dh, p_dweight_partial, p_dbias_partial,
    dy_stride, dsum_stride, h_stride, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)[None, :]
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        o_m = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (o_m < M) & (o_n < N)
        b_dy = tl.load(p_dy + o_m * dy_stride + o_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        b_h = tl.load(p_h + o_m * h_stride + o_n, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + o_m, mask=o_m < M, other=0.0)  # [BLOCK_M, 1]
        rstd = tl.load(p_rstd + o_m, mask=o_m < M, other=0.0)
        b_xhat = (b_h - mean) * rstd  # dy, and so g, is zero where the mask is not set
        b_dweight += b_dy * b_xhat
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
        b_dweight += b_dy * b_xhat
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


def plan_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, *,
    residual: Tensor | None = None, total: Tensor | None = None, eps: float, gpu: Gpu,
) -> LaunchPlan:  # fmt: skip
    """Forward over the rows of `x` (M, N); `residual` (M, N) and `total` (M, N) come together."""
    m, n = x.shape
    tile = row_tile(n, gpu)
    return LaunchPlan(
        layer_norm_kernel if n <= WHOLE_ROW_LIMIT else layer_norm_long_row_kernel,
        grid=(cdiv(m, tile.block_m),),
        arguments=dict(
            p_x=x, p_residual=residual, p_weight=weight, p_bias=bias, p_y=y, p_sum=total, p_mean=mean, p_rstd=rstd,
            x_stride=x.stride(0), residual_stride=0 if residual is None else residual.stride(0), M=m, N=n, eps=eps,
        ),
        constants=dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n),
        num_warps=tile.num_warps,
    )  # fmt: skip


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
        constants = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n)
        plans = [LaunchPlan(layer_norm_backward_kernel, (programs,), inputs | outputs, constants, tile.num_warps)]
    for partial, out in ((dweight_partial, dweight), (dbias_partial, dbias)):
        if partial is not None and out is not None:
            plans.append(plan_sum_rows(partial, out))
    return plans


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for m, n in ((8192, 4096), (8192, 8192), (65536, 128), (512, 262144)):
        x = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
        weight, stat = x.new_empty(n), x.new_empty(m, dtype=torch.float32)
        for residual in (None, x):
            shape = f"{m}x{n}" + ("" if residual is None else " add")
            yield (
                shape,
                plan_layer_norm(x, weight, weight, x, stat, stat, residual=residual, total=residual, eps=1e-5, gpu=gpu),
            )
        for plan in plan_layer_norm_backward(
            x, x, weight, stat, stat, x, dsum=x, dweight=weight, dbias=weight, gpu=gpu
        )[:-1]:  # the last one is the second of two equal sums
            yield f"{m}x{n}", plan


def _kernel(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    require_kernel_dtype(x=x, weight=weight, bias=bias)
    y, mean, rstd = _fake(x, weight, bias, eps)
    if x.numel():
        plan_layer_norm(
            as_rows(x), contiguous(weight), contiguous(bias), y, mean, rstd, eps=eps, gpu=gpu_of(x.device)
        ).launch()
    return y, mean, rstd


def _add_kernel(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_kernel_dtype(x=x, residual=residual, weight=weight, bias=bias)
    y, total, mean, rstd = _add_fake(x, residual, weight, bias, eps)
    if x.numel():
        plan_layer_norm(
            as_rows(x), contiguous(weight), contiguous(bias), y, mean, rstd,
            residual=as_rows(residual), total=total, eps=eps, gpu=gpu_of(x.device),
        ).launch()  # fmt: skip
    return y, total, mean, rstd


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


def _pytorch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    w, b = _accumulating(x, weight, bias)
    y, mean, rstd = torch.native_layer_norm(x.to(accumulation_dtype(x)), x.shape[-1:], w, b, eps)
    return y.to(_result_dtype(x, weight, bias)), mean.squeeze(-1), rstd.squeeze(-1)


def _add_pytorch(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, mean, rstd = _pytorch(total, weight, bias, eps)
    return y, total, mean, rstd


def _backward_pytorch(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy_, h_, w, b = _accumulating(h, dy, h, weight, bias)
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy_, h_, h.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), w, b, [True, weight_grad, bias_grad]
    )
    if dsum is not None:
        dh += dsum
    return (
        dh.to(h.dtype),
        h.new_empty(0) if weight is None or not weight_grad else dweight.to(weight.dtype),
        h.new_empty(0) if bias is None or not bias_grad else dbias.to(bias.dtype),
    )


def _accumulating(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = accumulation_dtype(like)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_contiguous(x, _result_dtype(x, weight, bias))
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x)) for _ in range(2))
    return y, mean, rstd


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _fake(x, weight, bias, eps)
    return y, empty_contiguous(x), mean, rstd


def _backward_fake(
    dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        empty_contiguous(h),
        h.new_empty(0) if weight is None or not weight_grad else weight.new_empty(weight.shape),
        h.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape),
    )


def _result_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    dtype = x.dtype
    for parameter in parameters:
        dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
    return dtype


layer_norm_op = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake,
)  # fmt: skip
add_layer_norm_op = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    kernel=_add_kernel, pytorch=_add_pytorch, fake=_add_fake,
)  # fmt: skip
layer_norm_backward_op = register(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor h, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " bool weight_grad, bool bias_grad) -> (Tensor dh, Tensor dweight, Tensor dbias)",
    kernel=_backward_kernel, pytorch=_backward_pytorch, fake=_backward_fake,
)  # fmt: skip


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            y, mean, rstd = layer_norm_op(x, weight, bias, eps)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be allocated and written
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        dh, dweight, dbias = _gradients(ctx, dy, None)
        return dh, dweight, dbias, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with below_autograd():
            y, total, mean, rstd = add_layer_norm_op(x, residual, weight, bias, eps)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be allocated and written
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        return y, total, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, dsum, None, None, None
        dh, dweight, dbias = _gradients(ctx, dy, dsum)
        return dh, dh, dweight, dbias, None


def _gradients(ctx: Any, dy: Tensor, dsum: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    h, weight, bias, mean, rstd = ctx.saved_tensors
    weight_grad, bias_grad = ctx.needs_input_grad[-3:-1]  # both functions end in (weight, bias, eps)
    dh, dweight, dbias = layer_norm_backward_op(dy, dsum, h, weight, bias, mean, rstd, weight_grad, bias_grad)
    return dh, dweight if weight_grad else None, dbias if bias_grad else None


register_autograd(layer_norm_op, _LayerNorm)
register_autograd(add_layer_norm_op, _AddLayerNorm)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, scaled by `weight` and shifted by `bias` in float32 and rounded once.

    Args:
        x: (..., hidden), float16, bfloat16 or float32 (float64 on the CPU).
        weight: (hidden,), or None for no scaling. A float32 weight or bias on a bfloat16 `x` gives float32.
        bias: (hidden,), or None for no shift.
        eps: added to the variance.
        residual: like `x`; added to it before the norm.

    Returns:
        (..., hidden), contiguous; with `residual` the pair (normed, x + residual).

    Raises:
        TypeError: a tensor is not floating point, or `x` and `residual` differ in dtype.
        ValueError: a shape or device does not fit.

    Source: arXiv:1607.06450.
    """
    require_floating(x=x)
    require_floating_or_none(weight=weight, bias=bias, residual=residual)
    require_same_device(x=x, weight=weight, bias=bias, residual=residual)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            require_shape(name, parameter, x.shape[-1:])
    if residual is None:
        return layer_norm_op(x, weight, bias, eps)[0]
    require_same(x=x, residual=residual)
    y, total, _, _ = add_layer_norm_op(x, residual, weight, bias, eps)
    return y, total
