"""Softmax over any dimension.

    y = exp(x - max(x)) / sum(exp(x - max(x)))          (float32, rounded once)

`x` is seen as (outer, N, inner) by its strides, and a program owns all N elements of BLOCK_I of the inner ones: of
neighbouring columns where `dim` is not the last, of whole rows where it is (then inner counts the rows). So neither needs
a transposed copy. What fits a program's registers is read once: in bf16 2 bytes are read and 2 written an element. Longer
ones are read twice, in tiles: for the running maximum and the sum that is rescaled to it (online softmax), then for y,
from the end, which is still in L2. 5 FLOPs an element: memory bound.

A slice of only -inf gives NaN, and so does one that holds +inf or NaN, as in PyTorch.

Kept for backward: y.

    dx = y * (dy - sum(dy * y))

Paper: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (arXiv:1805.02867).
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Gpu, LaunchPlan, as_rows, cdiv, empty_contiguous, gpu_of, next_power_of_2
from .library import below_autograd, call, register, register_autograd
from .rows import LONG_ROW_BLOCK, WHOLE_ROW_LIMIT, RowTile, forward_tile, row_tile
from .torch_compat import softmax_backward
from .triton_compat import tl, triton
from .validate import require_floating, require_kernel_dtype

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The running maximum's start: with -inf, exp(-inf - -inf) of a slice's leading -inf would be NaN."""


@triton.jit
def _slices(INNER, BLOCK_I: tl.constexpr):
    """The outer index of this program, and its BLOCK_I inner ones [BLOCK_I, 1]."""
    inner_blocks = tl.cdiv(INNER, BLOCK_I)
    i_o = (tl.program_id(0) // inner_blocks).to(tl.int64)
    return i_o, tl.program_id(0) % inner_blocks * BLOCK_I + tl.arange(0, BLOCK_I)[:, None].to(tl.int64)


@triton.jit
def softmax_kernel(
    p_x, p_y, x_stride_o, x_stride_n, x_stride_i, y_stride_o, y_stride_n, y_stride_i, N, INNER,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_o, o_i = _slices(INNER, BLOCK_I)
    o_n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    mask = (o_n < N) & (o_i < INNER)
    p_x += i_o * x_stride_o + o_i * x_stride_i + o_n * x_stride_n
    b_x = tl.load(p_x, mask=mask, other=float("-inf")).to(tl.float32)  # [BLOCK_I, BLOCK_N]
    b_y = tl.exp(b_x - tl.max(b_x, axis=1, keep_dims=True))
    b_y *= 1.0 / tl.sum(b_y, axis=1, keep_dims=True)
    tl.store(p_y + i_o * y_stride_o + o_i * y_stride_i + o_n * y_stride_n, b_y, mask=mask)


@triton.jit
def softmax_tiled_kernel(
    p_x, p_y, x_stride_o, x_stride_n, x_stride_i, y_stride_o, y_stride_n, y_stride_i, N, INNER,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_o, o_i = _slices(INNER, BLOCK_I)
    p_x += i_o * x_stride_o + o_i * x_stride_i  # [BLOCK_I, 1]
    p_y += i_o * y_stride_o + o_i * y_stride_i

    b_max = tl.full([BLOCK_I, 1], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_I, BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
        mask = (o_n < N) & (o_i < INNER)
        b_x = tl.load(p_x + o_n * x_stride_n, mask=mask, other=float("-inf")).to(tl.float32)  # [BLOCK_I, BLOCK_N]
        b_new_max = tl.maximum(b_max, tl.max(b_x, axis=1, keep_dims=True))
        b_sum = b_sum * tl.exp(b_max - b_new_max) + tl.exp(b_x - b_new_max)
        b_max = b_new_max
    b_scale = 1.0 / tl.sum(b_sum, axis=1, keep_dims=True)  # [BLOCK_I, 1]

    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for distance in range(0, N, BLOCK_N):
        o_n = last - distance + tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
        mask = (o_n < N) & (o_i < INNER)
        b_x = tl.load(p_x + o_n * x_stride_n, mask=mask, other=float("-inf")).to(tl.float32)
        tl.store(p_y + o_n * y_stride_n, tl.exp(b_x - b_max) * b_scale, mask=mask)


@triton.jit
def softmax_backward_kernel(
    p_dy, p_y, p_dx, dy_stride_o, dy_stride_n, dy_stride_i, y_stride_o, y_stride_n, y_stride_i,
    dx_stride_o, dx_stride_n, dx_stride_i, N, INNER, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_o, o_i = _slices(INNER, BLOCK_I)
    o_n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    mask = (o_n < N) & (o_i < INNER)
    p_dy += i_o * dy_stride_o + o_i * dy_stride_i + o_n * dy_stride_n
    p_y += i_o * y_stride_o + o_i * y_stride_i + o_n * y_stride_n
    b_dy = tl.load(p_dy, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_I, BLOCK_N]
    b_y = tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
    b_dx = b_y * (b_dy - tl.sum(b_dy * b_y, axis=1, keep_dims=True))
    tl.store(p_dx + i_o * dx_stride_o + o_i * dx_stride_i + o_n * dx_stride_n, b_dx, mask=mask)


@triton.jit
def softmax_backward_tiled_kernel(
    p_dy, p_y, p_dx, dy_stride_o, dy_stride_n, dy_stride_i, y_stride_o, y_stride_n, y_stride_i,
    dx_stride_o, dx_stride_n, dx_stride_i, N, INNER, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_o, o_i = _slices(INNER, BLOCK_I)
    p_dy += i_o * dy_stride_o + o_i * dy_stride_i  # [BLOCK_I, 1]
    p_y += i_o * y_stride_o + o_i * y_stride_i
    p_dx += i_o * dx_stride_o + o_i * dx_stride_i

    b_dot = tl.zeros([BLOCK_I, BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
        mask = (o_n < N) & (o_i < INNER)
        b_dy = tl.load(p_dy + o_n * dy_stride_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_I, BLOCK_N]
        b_dot += b_dy * tl.load(p_y + o_n * y_stride_n, mask=mask, other=0.0).to(tl.float32)
    dot = tl.sum(b_dot, axis=1, keep_dims=True)  # [BLOCK_I, 1]

    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for distance in range(0, N, BLOCK_N):
        o_n = last - distance + tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
        mask = (o_n < N) & (o_i < INNER)
        b_dy = tl.load(p_dy + o_n * dy_stride_n, mask=mask, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + o_n * y_stride_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dx + o_n * dx_stride_n, b_y * (b_dy - dot), mask=mask)


def plan_softmax(x: Tensor, y: Tensor, dim: int, *, gpu: Gpu) -> LaunchPlan:
    """Softmax of `x` over `dim` into `y`, which is contiguous."""
    arguments = _argument("x", x, dim) | _argument("y", y, dim)
    return _plan_slices(softmax_kernel, softmax_tiled_kernel, x, dim, arguments, gpu, forward=True)


def plan_softmax_backward(dy: Tensor, y: Tensor, dx: Tensor, dim: int, *, gpu: Gpu) -> LaunchPlan:
    """Backward over `dim` into `dx`, which is contiguous."""
    arguments = _argument("dy", dy, dim) | _argument("y", y, dim) | _argument("dx", dx, dim)
    return _plan_slices(softmax_backward_kernel, softmax_backward_tiled_kernel, y, dim, arguments, gpu)


def _plan_slices(
    whole_kernel: Any,
    tiled_kernel: Any,
    x: Tensor,
    dim: int,
    arguments: dict[str, Any],
    gpu: Gpu,
    *,
    forward: bool = False,
) -> LaunchPlan:
    outer, n, inner = _slices_shape(x, dim)
    if inner == 1:
        tile = forward_tile("softmax", n, x.dtype, gpu) if forward else row_tile(n, gpu)
        outer, inner = 1, outer
    else:
        tile = _column_tile(n, inner, gpu)
    return LaunchPlan(
        whole_kernel if n <= tile.block_n else tiled_kernel,
        grid=(outer * cdiv(inner, tile.block_m),),
        arguments=arguments | dict(N=n, INNER=inner),
        constants=dict(BLOCK_N=tile.block_n, BLOCK_I=tile.block_m),
        num_warps=tile.num_warps,
    )


def _argument(name: str, x: Tensor, dim: int) -> dict[str, Any]:
    """`x`, copied only where it has no such strides, with its strides as (outer, n, inner)."""
    outer, n, inner = _slices_shape(x, dim)
    strides: tuple[int, ...]
    if x.is_contiguous():
        strides = (0, 1, n) if inner == 1 else (n * inner, inner, 1)
    elif inner == 1:
        x = as_rows(x.reshape(outer, n))
        strides = (0, 1, x.stride(0))
    else:
        x = x.reshape(outer, n, inner)
        x = x if x.stride(2) == 1 else x.contiguous()
        strides = x.stride()
    return {f"p_{name}": x, **dict(zip(_STRIDES[name], strides, strict=True))}


_STRIDES = {name: [f"{name}_stride_{dim}" for dim in "oni"] for name in ("x", "y", "dx", "dy")}


def _slices_shape(x: Tensor, dim: int) -> tuple[int, int, int]:
    return math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])


@functools.lru_cache
def _column_tile(n: int, inner: int, gpu: Gpu) -> RowTile:
    """`block_m` neighbouring columns, 128 bytes in bf16 where there are so many, of `block_n` elements."""
    block_n = next_power_of_2(max(1, n))
    block_m = min(next_power_of_2(max(1, inner)), max(64, 2048 // block_n))
    if block_n * block_m > WHOLE_ROW_LIMIT:
        block_n = LONG_ROW_BLOCK // block_m
    return RowTile(block_m, block_n, max(1, min(16, block_n * block_m // 16 // gpu.warp_size)))


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for shape in ((8192, 4096), (8192, 16384), (8192, 128), (512, 262144), (64, 128, 4096)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        label = "x".join(map(str, shape)) + " dim 1"
        yield label, plan_softmax(x, x, 1, gpu=gpu)
        yield label, plan_softmax_backward(x, x, x, 1, gpu=gpu)


def _kernel(x: Tensor, dim: int) -> Tensor:
    require_kernel_dtype(x=x)
    y = empty_contiguous(x)
    if x.numel():
        plan_softmax(x, y, dim, gpu=gpu_of(x.device)).launch()
    return y


def _backward_kernel(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    dx = empty_contiguous(y)
    if y.numel():
        plan_softmax_backward(dy, y, dx, dim, gpu=gpu_of(y.device)).launch()
    return dx


def _pytorch(x: Tensor, dim: int) -> Tensor:
    return torch.softmax(x, dim).contiguous()


def _backward_pytorch(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    return softmax_backward(dy, y, dim, y.dtype).contiguous()


def _fake(x: Tensor, dim: int) -> Tensor:
    return empty_contiguous(x)


def _backward_fake(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    return empty_contiguous(y)


softmax_op = register("softmax(Tensor x, int dim) -> Tensor", kernel=_kernel, pytorch=_pytorch, fake=_fake)
softmax_backward_op = register(
    "softmax_backward(Tensor dy, Tensor y, int dim) -> Tensor",
    kernel=_backward_kernel, pytorch=_backward_pytorch, fake=_backward_fake,
)  # fmt: skip


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        y = below_autograd(softmax_op, x, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return softmax_backward_op(dy, *ctx.saved_tensors, ctx.dim), None


register_autograd(softmax_op, _Softmax)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) over `dim`, in float32, rounded once.

    Args:
        x: of any shape with at least one dimension, float16, bfloat16 or float32 (float64 on the CPU).
        dim: the dimension whose elements sum to one.

    Returns:
        Like `x`, contiguous. A slice of only -inf, or with +inf or NaN in it, is NaN, as in PyTorch.

    Raises:
        TypeError: `x` is not floating point, or `dim` is not an integer.
        ValueError: `x` is a scalar, or has no such dimension.

    Source: arXiv:1805.02867.
    """
    require_floating(x=x)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be from {-x.ndim} to {x.ndim - 1} for {x.ndim} dimensions, got {dim}")
    return call(softmax_op, x, dim % x.ndim)
