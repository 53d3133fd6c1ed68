"""LayerNorm, alone or with the residual add before it, in one pass.

    h = x + residual                                       (rounded to x's dtype, as an unfused model does)
    y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias   (float32, rounded once)

Forward: a program owns BLOCK_M rows. Rows up to 16k elements stay in registers: in bf16 2N bytes are read and 2N written
a row (4N and 4N with the residual). A longer row is read again for y, from its end, which is still in L2. 8N FLOPs a row:
memory bound.

The variance is that of h - mean, never E[h^2] - E[h]^2, and both come with the correction mean(h - mean), which float32
rounding keeps from being zero: rows far from zero lose no digits. Long rows take Welford's recurrence in each lane, and
join the lanes by Chan's formula.

Kept for backward (layer_norm_backward.py): h, and mean and rstd in float32.

Papers: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450); Chan, Golub and LeVeque, Updating Formulae and
a Pairwise Algorithm for Computing Sample Variances, 1979.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Gpu, LaunchPlan, as_rows, cdiv, empty_contiguous, gpu_of
from .layer_norm_backward import layer_norm_backward_op, plan_layer_norm_backward
from .library import below_autograd, call, register, register_autograd
from .rows import WHOLE_ROW_LIMIT, accumulation_dtype, cast, contiguous, row_tile
from .triton_compat import tl, triton
from .validate import (
    require_floating_on_one_device,
    require_kernel_dtype,
    require_same,
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


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for m, n in ((8192, 4096), (8192, 8192), (8192, 16384), (65536, 128), (512, 262144)):
        x = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
        weight, stat = x.new_empty(n), x.new_empty(m, dtype=torch.float32)
        for residual in (None, x):
            shape = f"{m}x{n}" + ("" if residual is None else " add")
            yield (
                shape,
                plan_layer_norm(x, weight, weight, x, stat, stat, residual=residual, total=residual, eps=1e-5, gpu=gpu),
            )
        *backward, _, sum_rows = plan_layer_norm_backward(
            x, x, weight, stat, stat, x, dsum=x, dweight=weight, dbias=weight, gpu=gpu
        )
        for plan in backward:
            yield f"{m}x{n}", plan
    yield f"{m}x{n}", sum_rows  # one binary for all sizes


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


def _pytorch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x)
    w, b = (None if parameter is None else cast(parameter, dtype) for parameter in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(cast(x, dtype), x.shape[-1:], w, b, eps)
    return cast(y, _result_dtype(x, weight, bias)), mean.squeeze(-1), rstd.squeeze(-1)


def _add_pytorch(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, mean, rstd = _pytorch(total, weight, bias, eps)
    return y, total, mean, rstd


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_contiguous(x, _result_dtype(x, weight, bias))
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x)) for _ in range(2))
    return y, mean, rstd


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _fake(x, weight, bias, eps)
    return y, empty_contiguous(x), mean, rstd


def _result_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    dtype = x.dtype
    for parameter in parameters:
        if parameter is not None and parameter.dtype != dtype:
            dtype = torch.promote_types(dtype, parameter.dtype)
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


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = below_autograd(layer_norm_op, x, weight, bias, eps)
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
        y, total, mean, rstd = below_autograd(add_layer_norm_op, x, residual, weight, bias, eps)
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
    require_floating_on_one_device(x, weight=weight, bias=bias, residual=residual)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    hidden = x.shape[-1:]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            require_shape(name, parameter, hidden)
    if residual is None:
        return call(layer_norm_op, x, weight, bias, eps)[0]
    require_same(x=x, residual=residual)
    y, total, _, _ = call(add_layer_norm_op, x, residual, weight, bias, eps)
    return y, total
