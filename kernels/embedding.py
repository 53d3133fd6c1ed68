"""The rows of a table that indices ask for: the embedding of tokens, in one launch.

    y[i] = weight[index[i]]

A program owns one row, in tiles of up to 4096 columns: each row is read once and written once, memory bound.

Backward: dweight is zero but for the rows that were asked for, the sums of those of dy in their order, in float32 and rounded once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .huge_pages import in_huge_pages
from .launch import Gpu, LaunchPlan, cdiv, next_power_of_2
from .library import below_autograd, register, register_autograd
from .rows import accumulation_dtype
from .triton_compat import tl, triton
from .validate import require_floating, require_same_device, require_tensors

WIDEST_TILE = 4096


@triton.jit
def embedding_kernel(
    p_index, p_weight, p_y, index_stride, weight_stride_n, weight_stride_k, y_stride, K, BLOCK_K: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_row = p_weight + tl.load(p_index + i_row * index_stride).to(tl.int64) * weight_stride_n
    b_row = tl.load(p_row + o_k.to(tl.int64) * weight_stride_k, mask=m_k)
    tl.store(p_y + i_row * y_stride + o_k, b_row, mask=m_k)


def plan_embedding(index: Tensor, weight: Tensor, y: Tensor) -> LaunchPlan:
    """y (rows, K) with contiguous rows from weight (N, K) of any strides."""
    rows, columns = y.shape
    block = min(WIDEST_TILE, next_power_of_2(max(1, columns)))
    weight_stride_n, weight_stride_k = weight.stride()
    return LaunchPlan(
        embedding_kernel,
        grid=(rows, cdiv(columns, block)),
        arguments=dict(
            p_index=index, p_weight=weight, p_y=y, index_stride=index.stride(0), weight_stride_n=weight_stride_n,
            weight_stride_k=weight_stride_k, y_stride=y.stride(0), K=columns,
        ),
        constants=dict(BLOCK_K=block),
        num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for rows, vocab, hidden in ((1, 128256, 4096), (16, 32000, 768), (2048, 128256, 4096)):
        index = torch.empty(rows, dtype=torch.int64, device="meta")
        weight = torch.empty(vocab, hidden, dtype=torch.bfloat16, device="meta")
        yield f"{rows} of {vocab}x{hidden}", plan_embedding(index, weight, weight.new_empty(rows, hidden))


def _kernel(index: Tensor, weight: Tensor) -> Tensor:
    y = _fake(index, weight)
    plan_embedding(index, weight, y).launch()
    return y


def _pytorch(index: Tensor, weight: Tensor) -> Tensor:
    return weight.index_select(0, index)


def _fake(index: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((index.shape[0], weight.shape[1]))


def _backward(dy: Tensor, index: Tensor, rows: int) -> Tensor:
    if dy.is_cuda:  # sorts, so that rows are added in one order
        dweight: Tensor = torch.ops.aten.embedding_dense_backward(dy, index, rows, -1, False)
        return dweight
    found, place = index.unique(return_inverse=True)
    dtype = accumulation_dtype(dy)
    sums = dy.new_zeros((len(found), dy.shape[1]), dtype=dtype).index_add_(0, place, dy.to(dtype))
    dweight = in_huge_pages(_backward_fake(dy, index, rows)).zero_()
    dweight[found] = sums.to(dy.dtype)
    return dweight


def _backward_fake(dy: Tensor, index: Tensor, rows: int) -> Tensor:
    return dy.new_empty((rows, dy.shape[1]))


def _require_rows(index: Tensor, weight: Tensor) -> None:
    wrong = index[(index < 0) | (index >= weight.shape[0])]
    if len(wrong):
        raise IndexError(f"index must be from 0 to {weight.shape[0] - 1}, the rows of weight, got {int(wrong[0])}")


embedding_op = register(
    "embedding(Tensor index, Tensor weight) -> Tensor",
    kernel=_kernel,
    pytorch=_pytorch,
    fake=_fake,
    check=_require_rows,
)


embedding_backward_op = register(
    "embedding_backward(Tensor dy, Tensor index, SymInt rows) -> Tensor",
    kernel=_backward,
    pytorch=_backward,
    fake=_backward_fake,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = weight.shape[0]
        y: Tensor = below_autograd(embedding_op, index, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, embedding_backward_op(dy, *ctx.saved_tensors, ctx.rows)


register_autograd(embedding_op, _Embedding)


def embedding(index: Tensor, weight: Tensor) -> Tensor:
    """The rows of `weight` that `index` asks for.

    Args:
        index: (rows,) int64, each from 0 to N - 1 (not checked on a GPU).
        weight: (N, K) of any floating-point dtype and strides.

    Returns:
        (rows, K) of weight's dtype, contiguous.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit.
        IndexError: on the CPU, an index is none of weight's rows.
    """
    require_tensors(index=index)
    require_floating(weight=weight)
    require_same_device(index=index, weight=weight)
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"index must be (rows,), got {tuple(index.shape)}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be (N, K), got {tuple(weight.shape)}")
    y: Tensor = embedding_op(index, weight)
    return y
