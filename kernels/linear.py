"""A linear layer with an epilogue: bias, activation and residual add, before the one rounding.

    y = act(x @ weight^T + bias) + residual          x (M, K), weight (N, K), float32 accumulation

2MNK FLOPs. The product with its epilogue is in `matmul.py`: up to 16 rows stream the weight, more are tiled.

Backward, with p = x @ weight^T + bias and dp = (dy * act'(p)), rounded to x's dtype:

    dx = dp @ weight      dweight = dp^T @ x      dbias = sum over rows of dp      dresidual = dy

p is kept, rounded to x's dtype, where there is an activation: 4 bytes of traffic an element, where computing it again costs
2K FLOPs; on an H200 (about 4.3 TB/s, 780 TFLOP/s) 1 ps against 10 ps at K = 4096. x is kept only if dweight is asked for,
weight only for dx, and p for neither of them nor dbias: a frozen weight (LoRA) keeps no activations in memory.
dp and dbias are one pass of a Triton kernel, with float32 partials added in a fixed order. dx and dweight are plain
products, with nothing to fuse and large in every dimension: cuBLAS's ground, oneDNN's, and MKL's. dweight is taken from cuBLAS in float32
and then rounded, since it may add the parts of a split sum over rows in bf16 otherwise.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import flops
from .activation import activation_slope
from .cpu import converts, has_fast_mkl, has_large_products
from .huge_pages import in_huge_pages
from .launch import Gpu, LaunchPlan, allow_tf32, as_rows, cdiv, gpu_of
from .library import below_autograd, call, register, register_autocast, register_autograd
from .matmul import FEW_ROWS, library_linear, multiply, plan_linear
from .rows import accumulation_dtype, plan_sum_rows
from .triton_compat import tl, triton
from .validate import (
    require_floating,
    require_floating_or_none,
    require_kernel_dtype,
    require_same_device,
    require_shape,
)


@triton.jit
def linear_backward_epilogue_kernel(
    p_dy, p_preactivation, p_dp, p_dbias_partial, dy_stride, M, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i_n, i_p) walks over every num_programs(1)-th tile of a block of columns: dp, and its part of dbias."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        o_m = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        mask = (o_m < M) & (o_n < N)
        b_dp = tl.load(p_dy + o_m * dy_stride + o_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if ACTIVATION is not None:
            b_p = tl.load(p_preactivation + o_m * N + o_n, mask=mask, other=0.0).to(tl.float32)
            b_dp *= activation_slope(b_p, ACTIVATION)
            tl.store(p_dp + o_m * N + o_n, b_dp, mask=mask)
        b_dbias += b_dp
    if p_dbias_partial is not None:
        p_partial = p_dbias_partial + tl.program_id(1).to(tl.int64) * N + o_n
        tl.store(p_partial, tl.sum(b_dbias, axis=0, keep_dims=True), mask=o_n < N)


def plan_linear_backward_epilogue(
    dy: Tensor, preactivation: Tensor | None, dp: Tensor | None, dbias: Tensor | None, *,
    activation: str | None, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """dp and dbias from dy (M, N) and the pre-activation; without an activation dp is dy, and None here."""
    m, n = dy.shape
    block_m, block_n = 16, 128
    column_blocks = cdiv(n, block_n)
    programs = min(cdiv(m, block_m), cdiv(8 * gpu.multiprocessors, max(1, column_blocks)))
    partial = None if dbias is None else dbias.new_empty((programs, n), dtype=torch.float32)
    plans = [
        LaunchPlan(
            linear_backward_epilogue_kernel,
            grid=(column_blocks, programs),
            arguments=dict(
                p_dy=dy,
                p_preactivation=preactivation,
                p_dp=dp,
                p_dbias_partial=partial,
                dy_stride=dy.stride(0),
                M=m,
                N=n,
            ),
            constants=dict(ACTIVATION=activation, BLOCK_M=block_m, BLOCK_N=block_n),
        )
    ]
    if partial is not None and dbias is not None:
        plans.append(plan_sum_rows(partial, dbias))
    return plans


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for m, n, k in (
        (1, 4096, 14336),
        (1, 1024, 4096),
        (8, 4096, 4096),
        (8, 14336, 4096),
        (64, 4096, 4096),
        (8192, 4096, 14336),
    ):
        x, weight, y = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((m, k), (n, k), (m, n)))
        for plan in plan_linear(x, weight, None, y, y, gpu=gpu):
            yield f"{m}x{n}x{k}+residual", plan
    x, weight, y = (
        torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((8192, 4096), (14336, 4096), (8192, 14336))
    )
    bias = weight[:, 0].contiguous()
    for plan in plan_linear(x, weight, bias, None, y, activation="gelu", preactivation=y, gpu=gpu):
        yield "8192x14336x4096+bias+gelu", plan
    for plan in plan_linear_backward_epilogue(y, y, y, bias, activation="gelu", gpu=gpu):
        yield "8192x14336+bias+gelu", plan


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    y = _fake(x, weight, bias, residual, activation)
    _launch(x, weight, bias, residual, activation, y, None)
    return y


def _training_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    y, preactivation = _training_fake(x, weight, bias, residual, activation)
    _launch(x, weight, bias, residual, activation, y, preactivation)
    return y, preactivation


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None,
    y: Tensor, preactivation: Tensor | None,
) -> None:  # fmt: skip
    require_kernel_dtype(x=x, weight=weight, bias=bias, residual=residual)
    plans = plan_linear(
        as_rows(x), weight, None if bias is None else bias.contiguous(), None if residual is None else as_rows(residual),
        y, activation=activation, preactivation=preactivation, allow_tf32=allow_tf32(x), gpu=gpu_of(x.device),
    )  # fmt: skip
    for plan in plans:
        plan.launch()


def _backward_kernel(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, preactivation: Tensor | None, activation: str | None,
    dtype: torch.dtype, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dp = rows = as_rows(dy)
    dbias = rows.new_empty(rows.shape[1] if bias_grad else 0, dtype=dtype)
    if activation is not None:
        dp = rows.new_empty(rows.shape, dtype=dtype)
    if activation is not None or bias_grad:
        plans = plan_linear_backward_epilogue(
            rows, preactivation, None if activation is None else dp, dbias if bias_grad else None,
            activation=activation, gpu=gpu_of(dy.device),
        )  # fmt: skip
        for plan in plans:
            plan.launch()
    return *_products(dp.to(dtype), x, weight, dy.shape), dbias


def _products(dp: Tensor, x: Tensor | None, weight: Tensor | None, y_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """dx and dweight, each empty where what it is made from is not given."""
    dx, dweight = dp.new_empty(0), dp.new_empty(0)
    if weight is not None:
        dx = multiply(dp, weight).view(*y_shape[:-1], weight.shape[1])
    if x is not None:
        rows = x.reshape(dp.shape[0], x.shape[-1])
        if dp.is_cuda and dp.dtype in (torch.float16, torch.bfloat16):
            dweight = torch.mm(dp.t(), rows, out_dtype=torch.float32).to(dp.dtype)
        else:
            dweight = in_huge_pages(dp.new_empty(dp.shape[1], rows.shape[1]))
            multiply(dp.t(), rows, out=dweight)
    return dx, dweight


def _pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    _result_dtype(x, weight, bias, residual)
    return _pytorch_epilogue(library_linear(x, weight, bias), residual, activation)


def _training_pytorch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    _result_dtype(x, weight, bias, residual)
    preactivation = library_linear(x, weight, bias)
    return _pytorch_epilogue(preactivation, residual, activation), preactivation


def _pytorch_epilogue(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    if residual is None:
        return y
    return y.add_(residual) if residual.dtype == y.dtype else y + residual


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip

_SLOPES: dict[str, Callable[..., Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "relu": lambda dy, p: torch.ops.aten.threshold_backward(dy, p, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dy, p: torch.ops.aten.gelu_backward(dy, p, approximate="tanh"),
}


def _backward_pytorch(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, preactivation: Tensor | None, activation: str | None,
    dtype: torch.dtype, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dp = dy.to(dtype)
    if activation is not None:
        dp = _SLOPES[activation](dp, preactivation)
    dp = as_rows(dp)
    dbias = dp.sum(0, dtype=accumulation_dtype(dp)).to(dtype) if bias_grad else dp.new_empty(0)
    return *_products(dp, x, weight, dy.shape), dbias


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> Tensor:
    *rows, _ = x.shape
    return x.new_empty([*rows, weight.shape[0]], dtype=_result_dtype(x, weight, bias, residual))


def _training_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    y = _fake(x, weight, bias, residual, activation)
    return y, y.new_empty(y.shape, dtype=x.dtype)


def _backward_fake(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, preactivation: Tensor | None, activation: str | None,
    dtype: torch.dtype, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out_features = dy.shape[-1]
    return (
        dy.new_empty(0 if weight is None else (*dy.shape[:-1], weight.shape[1]), dtype=dtype),
        dy.new_empty(0 if x is None else (out_features, x.shape[-1]), dtype=dtype),
        dy.new_empty(out_features if bias_grad else 0, dtype=dtype),
    )


def _result_dtype(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> torch.dtype:
    require_dtype(x, weight=weight, bias=bias)
    # `promote_types` is an operator: a call that makes it is neither remembered nor recorded
    if residual is None or residual.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, residual.dtype)


def require_dtype(x: Tensor, **others: Tensor | None) -> None:
    """Each of the others must have x's dtype. Checked below autocast, which makes them agree."""
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"{name} must have the input's dtype, {x.dtype}, got {other.dtype}")


def _pytorch_is_faster(x: Tensor, weight: Tensor, bias: Any, residual: Tensor | None, *rest: Any) -> bool:
    """Beyond few rows oneDNN's packed products win on most CPUs; with a small weight MKL's in float32, where it is fast, and no second operator adds
    a residual (one row, 576x576: 28 us of PyTorch's two, 21 of ours). It has a product of its own for up to three rows."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows > FEW_ROWS:
        return not has_large_products(x.dtype)
    limit = 2**21 if rows < 4 else 2**19  # 12 rows, 576x1536: 532 us of PyTorch's, 261 of ours
    small = x.dtype == torch.float32 and residual is None and weight.numel() < limit and has_fast_mkl()
    return small or converts(x)


linear_op = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation) -> Tensor",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.linear,
    pytorch_is_faster=_pytorch_is_faster,
)  # fmt: skip
linear_training_op = register(
    "linear_training(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation)"
    " -> (Tensor y, Tensor preactivation)",
    kernel=_training_kernel, pytorch=_training_pytorch, fake=_training_fake, flops=flops.linear,
    pytorch_is_faster=_pytorch_is_faster,
)  # fmt: skip
linear_backward_op = register(
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? preactivation, str? activation, ScalarType dtype,"
    " bool bias_grad) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    kernel=_backward_kernel, pytorch=_backward_pytorch, fake=_backward_fake, flops=flops.linear_backward,
    pytorch_is_faster=lambda dy, x, weight, preactivation, activation, dtype, *_: not has_large_products(dtype),
)  # fmt: skip


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
    ) -> Tensor:
        x_grad, weight_grad, bias_grad = ctx.needs_input_grad[:3]
        preactivation = None
        if activation is not None and (x_grad or weight_grad or bias_grad):
            y, preactivation = below_autograd(linear_training_op, x, weight, bias, residual, activation)
        else:
            y = below_autograd(linear_op, x, weight, bias, residual, activation)
        ctx.save_for_backward(x if weight_grad else None, weight if x_grad else None, preactivation)
        ctx.activation, ctx.dtype = activation, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dweight = dbias = None
        x_grad, weight_grad, bias_grad, residual_grad, _ = ctx.needs_input_grad
        if x_grad or weight_grad or bias_grad:
            dx, dweight, dbias = linear_backward_op(dy, *ctx.saved_tensors, ctx.activation, ctx.dtype, bias_grad)
        return (
            dx if x_grad else None,
            dweight if weight_grad else None,
            dbias if bias_grad else None,
            dy.to(ctx.residual_dtype) if residual_grad else None,
            None,
        )


register_autograd(linear_op, _Linear)
register_autocast(linear_op, keep=("residual",))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(x @ weight.T + bias) + residual.

    The kernels accumulate in float32, apply all of it there and round once. Where a CPU takes PyTorch's ops instead (for more
    than 16 rows, unless it multiplies bfloat16 slower than float32; oneDNN multiplies then), these follow one after the other, and each
    rounds to its dtype.

    Args:
        x: (..., in_features), float16, bfloat16 or float32 (float64 on the CPU).
        weight: (out_features, in_features), of x's dtype, with any strides.
        bias: (out_features,), of x's dtype.
        activation: "gelu" is the error-function form, "gelu_tanh" its tanh form.
        residual: (..., out_features), added after the activation. A float32 residual of a bfloat16 `x` (under autocast)
            is added in float32 and gives float32.

    Returns:
        (..., out_features), contiguous.

    Under `torch.autocast`, `x`, `weight` and `bias` are cast as `F.linear` casts them; `residual` is not. float32 products
    take TensorFloat-32 only if `torch.backends.cuda.matmul` allows it.

    Raises:
        TypeError: a tensor is not floating point, or `x`, `weight` and `bias` differ in dtype.
        ValueError: a shape, device or `activation` does not fit.
    """
    return call(
        linear_op, x, weight, bias, residual, activation, check=lambda: _check(x, weight, bias, residual, activation)
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> None:
    require_floating(x=x, weight=weight)
    require_floating_or_none(bias=bias, residual=residual)
    require_same_device(x=x, weight=weight, bias=bias, residual=residual)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape (out_features, {x.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None:
        require_shape("bias", bias, weight.shape[:1])
    if residual is not None:
        require_shape("residual", residual, (*x.shape[:-1], weight.shape[0]))
    if activation is not None and activation not in (*_ACTIVATIONS,):  # a tuple, to which what has no hash may come
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)} or None, got {activation!r}")
