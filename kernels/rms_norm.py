"""RMSNorm, alone or with the residual add before it, in one pass.

    h = x + residual                                  (rounded to x's dtype, as an unfused model does)
    y = h * rsqrt(mean(h^2) + eps) * (weight + offset)  (float32, rounded once; Gemma has offset = 1)

Forward: a program owns BLOCK_M rows. Rows up to 16k elements stay in registers: in bf16 2N bytes are read and 2N written
a row (4N and 4N with the residual). A longer row is read again for y, from its end, which is still in L2. 4N FLOPs a row:
memory bound.

Kept for backward (rms_norm_backward.py): h, and rstd in float32.

Paper: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Gpu, LaunchPlan, as_rows, cdiv, empty_contiguous, gpu_of
from .library import below_autograd, call, register, register_autograd
from .rms_norm_backward import plan_rms_norm_backward, rms_norm_backward_op
from .rows import WHOLE_ROW_LIMIT, accumulation_dtype, cast, contiguous, forward_tile
from .triton_compat import tl, triton
from .validate import (
    require_floating_on_one_device,
    require_kernel_dtype,
    require_same,
    require_shape,
)


@triton.jit
def rms_norm_kernel(
    p_x, p_residual, p_weight, p_y, p_sum, p_rstd, x_stride, residual_stride, M, N, eps, offset,
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
    rstd = 1.0 / tl.sqrt(tl.sum(b_h * b_h, axis=1, keep_dims=True) / N + eps)  # [BLOCK_M, 1]
    tl.store(p_rstd + o_m, rstd, mask=o_m < M)

    b_y = b_h * rstd
    if p_weight is not None:
        b_y *= tl.load(p_weight + o_n, mask=o_n < N, other=0.0).to(tl.float32) + offset
    tl.store(p_y + o_m * N + o_n, b_y, mask=mask)


@triton.jit
def rms_norm_long_row_kernel(
    p_x, p_residual, p_weight, p_y, p_sum, p_rstd, x_stride, residual_stride, M, N, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    b_square = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        mask = start + o_n < N
        b_h = tl.load(p_x + i_m * x_stride + start + o_n, mask=mask, other=0.0)
        if p_residual is not None:
            b_residual = tl.load(p_residual + i_m * residual_stride + start + o_n, mask=mask, other=0.0)
            b_h = (b_h.to(tl.float32) + b_residual.to(tl.float32)).to(b_h.dtype)
            tl.store(p_sum + i_m * N + start + o_n, b_h, mask=mask)
        b_square += b_h.to(tl.float32) * b_h.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(b_square) / N + eps)
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
        b_y = b_h.to(tl.float32) * rstd
        if p_weight is not None:
            b_y *= tl.load(p_weight + start + o_n, mask=mask, other=0.0).to(tl.float32) + offset
        tl.store(p_y + i_m * N + start + o_n, b_y, mask=mask)


def plan_rms_norm(
    x: Tensor, weight: Tensor | None, y: Tensor, rstd: Tensor, *,
    residual: Tensor | None = None, total: Tensor | None = None, eps: float, offset: float, gpu: Gpu,
) -> LaunchPlan:  # fmt: skip
    """Forward over the rows of `x` (M, N); `residual` (M, N) and `total` (M, N) come together."""
    m, n = x.shape
    tile = forward_tile("rms_norm", n, x.dtype, gpu)
    return LaunchPlan(
        rms_norm_kernel if n <= WHOLE_ROW_LIMIT else rms_norm_long_row_kernel,
        grid=(cdiv(m, tile.block_m),),
        arguments=dict(
            p_x=x, p_residual=residual, p_weight=weight, p_y=y, p_sum=total, p_rstd=rstd,
            x_stride=x.stride(0), residual_stride=0 if residual is None else residual.stride(0),
            M=m, N=n, eps=eps, offset=offset,
        ),
        constants=dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n),
        num_warps=tile.num_warps,
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for m, n in ((8192, 4096), (8192, 8192), (8192, 16384), (65536, 128), (512, 262144)):
        x, dweight = torch.empty(m, n, dtype=torch.bfloat16, device="meta"), torch.empty(n, device="meta")
        rstd, weight = torch.empty(m, device="meta"), dweight.bfloat16()
        yield f"{m}x{n}", plan_rms_norm(x, weight, x, rstd, eps=1e-6, offset=0.0, gpu=gpu)
        yield f"{m}x{n} add", plan_rms_norm(x, weight, x, rstd, residual=x, total=x, eps=1e-6, offset=0.0, gpu=gpu)
        *backward, sum_rows = plan_rms_norm_backward(x, x, weight, rstd, x, dsum=x, dweight=weight, offset=0.0, gpu=gpu)
        for plan in backward:
            yield f"{m}x{n}", plan
    yield f"{m}x{n}", sum_rows  # one binary for all sizes


def _kernel(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    require_kernel_dtype(x=x, weight=weight)
    y, rstd = _fake(x, weight, eps, offset)
    if x.numel():
        gpu = gpu_of(x.device)
        plan_rms_norm(as_rows(x), contiguous(weight), y, rstd, eps=eps, offset=offset, gpu=gpu).launch()
    return y, rstd


def _add_kernel(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    require_kernel_dtype(x=x, residual=residual, weight=weight)
    y, total, rstd = _add_fake(x, residual, weight, eps, offset)
    if x.numel():
        plan_rms_norm(
            as_rows(x), contiguous(weight), y, rstd, residual=as_rows(residual), total=total,
            eps=eps, offset=offset, gpu=gpu_of(x.device),
        ).launch()  # fmt: skip
    return y, total, rstd


def _pytorch(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    h = cast(x, accumulation_dtype(x))
    rstd = h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = h * rstd
    if weight is not None:
        y *= weight.to(h.dtype) + offset if offset else weight
    return cast(y, _result_dtype(x, weight)).contiguous(), rstd.squeeze(-1)


def _add_pytorch(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    y, rstd = _pytorch(total, weight, eps, offset)
    return y, total, rstd


def _fake(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y = empty_contiguous(x, _result_dtype(x, weight))
    return y, x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x))


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake(x, weight, eps, offset)
    return y, empty_contiguous(x), rstd


def _result_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    return x.dtype if weight is None or weight.dtype == x.dtype else torch.promote_types(x.dtype, weight.dtype)


rms_norm_op = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor y, Tensor rstd)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake,
)  # fmt: skip
add_rms_norm_op = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset)"
    " -> (Tensor y, Tensor sum, Tensor rstd)",
    kernel=_add_kernel, pytorch=_add_pytorch, fake=_add_fake,
)  # fmt: skip


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        y, rstd = below_autograd(rms_norm_op, x, weight, eps, offset)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be allocated and written
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        h, weight, rstd = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[1]
        dh, dweight = rms_norm_backward_op(dy, None, h, weight, rstd, ctx.offset, weight_grad)
        return dh, dweight if weight_grad else None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, total, rstd = below_autograd(add_rms_norm_op, x, residual, weight, eps, offset)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be allocated and written
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        return y, total, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, dsum, None, None, None
        h, weight, rstd = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[2]
        dh, dweight = rms_norm_backward_op(dy, dsum, h, weight, rstd, ctx.offset, weight_grad)
        return dh, dh, dweight if weight_grad else None, None, None


register_autograd(rms_norm_op, _RMSNorm)
register_autograd(add_rms_norm_op, _AddRMSNorm)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, multiplied by `weight + offset` in float32 and rounded once.

    Args:
        x: (..., hidden), float16, bfloat16 or float32 (float64 on the CPU).
        weight: (hidden,), or None for no scaling. A float32 weight on a bfloat16 `x` gives float32.
        eps: added to the mean square.
        residual: like `x`; added to it before the norm.
        offset: 1.0 for Gemma, whose weight is stored as a distance from one.

    Returns:
        (..., hidden), contiguous; with `residual` the pair (normed, x + residual).

    Raises:
        TypeError: a tensor is not floating point, or `x` and `residual` differ in dtype.
        ValueError: a shape or device does not fit.

    Source: arXiv:1910.07467.
    """
    require_floating_on_one_device(x, weight=weight, residual=residual)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight is not None:
        require_shape("weight", weight, x.shape[-1:])
    if residual is None:
        return call(rms_norm_op, x, weight, eps, offset)[0]
    require_same(x=x, residual=residual)
    y, total, _ = call(add_rms_norm_op, x, residual, weight, eps, offset)
    return y, total
