"""A linear layer and the cross entropy of its output, without the logits ever being whole in memory.

    loss = cross_entropy(hidden @ weight^T + bias, labels)          hidden (T, H), weight (V, H)

The tokens are taken in chunks: logits of the chunk (a plain product: cuBLAS), their losses (`cross_entropy_kernel`), their
gradient in the same buffer (`cross_entropy_backward_kernel`), dhidden of the chunk (cuBLAS), and dweight += dlogits^T @
hidden in float32 (`linear_kernel` with dweight as its residual: no second buffer of the weight's size).

When the gradient is made. For "mean" and "sum" every token has the same upstream gradient, so forward makes the gradients,
for an upstream gradient of 1, and backward multiplies them by what came: 6THV FLOPs in all, where computing the logits again
takes 8THV. For "none" a token's upstream gradient arrives in backward only: the logits are computed again there. The factor
1/count of the mean is left to backward too, in float32, so that float16 gradients do not vanish before a loss scaler
has its say. Nothing waits for the GPU: the count is a tensor.

Chunks. Each costs 8HV bytes of reading and writing dweight, against 6HV FLOPs a token: at 780 TFLOP/s and 4.3 TB/s the
traffic takes as long as 242 tokens. A chunk has as many tokens as the weight has columns, at least 1024: the logits are then
no larger than the weight, and the traffic is 6 % of the time at H = 4096 (12 % at 2048). Bytes above the inputs and results,
for LLaMA-3 8B in bf16 (H = 4096, V = 128256): 1.05 GB of logits and 2.1 GB of dweight in float32, for any T; the logits of
16384 tokens would be 4.2 GB, three to six times over in an unfused loss.

Kept for backward ("mean", "sum"): dhidden in hidden's dtype; dweight in float32 too, where there are several chunks; dbias in float32.
Backward multiplies them where they are, and gives them away: a second dweight of 98 MB took a CPU 34 ms of 170, all but 2 of them to
get the memory. Who goes back a second time through a graph that was kept has them computed again. For "none": lse.

A fully fused kernel (Wijmans et al., Cut Your Losses, 2024, arXiv:2411.09009) saves the buffer of logits, and computes them
again in backward, with dweight added up by atomics or locks: not the same bits every run.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import flops
from .cpu import multiplies, runs_natively
from .cross_entropy import (
    gradient_kernel,
    losses_kernel,
    plan_cross_entropy,
    plan_cross_entropy_backward,
    reduce_losses,
)
from .cross_entropy_pytorch import gradient_pytorch, losses_pytorch
from .huge_pages import in_huge_pages
from .launch import INTERPRETED, Gpu, LaunchPlan, allow_tf32, as_rows, cdiv, gpu_of
from .library import below_autograd, call, register, register_autocast, register_autograd
from .linear import require_dtype
from .matmul import multiply, plan_linear
from .objective import Objective, require_labels, require_loss_arguments
from .rows import accumulation_dtype
from .validate import (
    require_floating,
    require_floating_or_none,
    require_kernel_dtype,
    require_same_device,
    require_shape,
)

LEAST_CHUNK = 1024
"""Tokens of a chunk of a narrow model."""

CHUNK_MULTIPLE = 64
"""Tokens in a step of the product for dweight: what divides them needs no mask."""


def chunk_tokens(in_features: int) -> int:
    """Tokens in a chunk, at most."""
    return _round_up(max(LEAST_CHUNK, in_features))


def _round_up(tokens: int) -> int:
    return cdiv(tokens, CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def _chunks(tokens: int, limit: int) -> Iterator[slice]:
    """Nearly equal chunks of at most `limit` tokens, all but the last a multiple of CHUNK_MULTIPLE."""
    size = min(limit, _round_up(cdiv(tokens, cdiv(tokens, limit)))) if tokens else 1
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def plan_add_weight_gradient(
    dlogits: Tensor, hidden: Tensor, dweight: Tensor, *, first: bool, tf32: bool = False, gpu: Gpu
) -> list[LaunchPlan]:
    """dweight (V, H) += dlogits^T @ hidden, or = in the `first` chunk. float32, but for a chunk that is alone."""
    residual = None if first else dweight
    return plan_linear(dlogits.t(), hidden.t(), None, residual, dweight, allow_tf32=tf32, gpu=gpu)


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    vocab, in_features = 128256, 4096
    tokens = chunk_tokens(in_features)
    logits, hidden = (torch.empty(tokens, size, dtype=torch.bfloat16, device="meta") for size in (vocab, in_features))
    labels, lse = torch.empty(tokens, dtype=torch.int64, device="meta"), torch.empty(tokens, 2, device="meta")
    losses = torch.empty(tokens, device="meta")
    objective, shape = Objective(-100, 0.0, 0.0, None), f"{tokens}x{vocab}x{in_features}"
    yield shape, plan_cross_entropy(logits, labels, losses, lse, objective, gpu=gpu)
    yield shape, plan_cross_entropy_backward(logits, labels, lse, logits, objective, dloss=None, count=None)
    dweight = torch.empty(vocab, in_features, device="meta")
    for plan in plan_add_weight_gradient(logits, hidden, dweight, first=False, gpu=gpu):
        yield shape, plan


def _walk(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, objective: Objective, limit: int, lse: Tensor,
    gradients: Sequence[Tensor], needed: Sequence[bool], *,
    losses: Tensor | None = None, dlosses: Tensor | None = None,
) -> None:  # fmt: skip
    """Over hidden (T, H): writes `losses` and `lse` if it is given `losses`, then the gradients that are needed."""
    dhidden, dweight, dbias = gradients
    gradients = dhidden.view(hidden.shape if needed[0] else 0), dweight, dbias
    natively = runs_natively(hidden)
    # PyTorch on a CPU has no product of bfloat16 that gives float32: converted first it took 2.2 times as long as ours
    products_on_triton = (
        hidden.is_cuda or INTERPRETED or (natively and hidden.dtype == torch.bfloat16 and multiplies(hidden.dtype))
    )
    on_triton = products_on_triton or natively
    write_losses, write_gradient = (losses_kernel, gradient_kernel) if on_triton else (losses_pytorch, gradient_pytorch)
    several = hidden.shape[0] > limit
    buffer = in_huge_pages(hidden.new_empty((limit, weight.shape[0]))) if several else None
    for chunk in _chunks(hidden.shape[0], limit):
        out = None if buffer is None else buffer[: chunk.stop - chunk.start]
        logits = multiply(hidden[chunk], weight.t(), bias, out=out)
        if losses is not None:
            write_losses(logits, labels[chunk], losses[chunk], lse[chunk], objective)
        if any(needed):
            dloss = None if dlosses is None else dlosses[chunk]
            write_gradient(logits, labels[chunk], lse[chunk], logits, objective, dloss=dloss, count=None)
            _add_products(logits, hidden[chunk], weight, chunk, gradients, needed, products_on_triton)


def _add_products(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, chunk: slice, gradients: Sequence[Tensor],
    needed: Sequence[bool], on_triton: bool,
) -> None:  # fmt: skip
    dhidden, dweight, dbias = gradients
    first = chunk.start == 0
    if needed[0]:
        multiply(dlogits, weight, out=dhidden[chunk])
    if needed[1] and on_triton:
        plans = plan_add_weight_gradient(
            dlogits, hidden, dweight, first=first, tf32=allow_tf32(hidden), gpu=gpu_of(hidden.device)
        )
        for plan in plans:
            plan.launch()
    elif needed[1]:
        operands = dlogits.t().to(dweight.dtype), hidden.to(dweight.dtype)
        torch.mm(*operands, out=dweight) if first else dweight.addmm_(*operands)
    if needed[2]:
        total = dlogits.sum(0, dtype=dbias.dtype)
        dbias.copy_(total if first else dbias + total)


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float | None, reduction: str, chunk: int, *needed: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if hidden.is_cuda or INTERPRETED:
        require_kernel_dtype(hidden=hidden, weight=weight, bias=bias)
    objective = Objective(ignore_index, label_smoothing, z_loss, softcap)
    loss, lse, count, *gradients = _fake(hidden, weight, labels, bias, *objective, reduction, chunk, *needed)
    if not labels.numel():
        torch._foreach_zero_(gradients)
    labels = labels.reshape(-1).contiguous()
    losses = loss.view(-1) if reduction == "none" else lse.new_empty(labels.numel())
    _walk(as_rows(hidden), weight, labels, bias, objective, chunk, lse, gradients, needed, losses=losses)
    if reduction != "none":
        reduce_losses(losses, labels, loss, count, reduction, ignore_index)
    return loss, lse, count, *gradients


def _require_labels(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, *_: Any
) -> None:
    require_labels(labels, weight.shape[0], ignore_index)


def _fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float | None, reduction: str, chunk: int, *needed: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    require_dtype(hidden, weight=weight, bias=bias)
    dtype = accumulation_dtype(hidden)
    return (
        hidden.new_empty(labels.shape if reduction == "none" else (), dtype=dtype),
        hidden.new_empty((labels.numel(), 2), dtype=dtype),
        hidden.new_empty(() if reduction == "mean" else 0, dtype=dtype),
        *_new_gradients(hidden, weight, labels.numel(), chunk, needed),
    )


def _new_gradients(
    hidden: Tensor, weight: Tensor, tokens: int, chunk: int, needed: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias; each empty if it is not needed. What chunks are added to is float32; a dweight of one chunk is not
    (of 32000 x 768 the float32 one took 40 ms of 190: to get the memory, to write and to scale it)."""
    dtype = accumulation_dtype(hidden)
    dweight = weight.new_empty(
        weight.shape if needed[1] else 0, dtype=dtype if tokens > chunk or weight.dtype == torch.float16 else None
    )
    return (
        hidden.new_empty(hidden.shape if needed[0] else 0),
        in_huge_pages(dweight),
        weight.new_empty(weight.shape[0] if needed[2] else 0, dtype=dtype),
    )


def _backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, chunk: int, *needed: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    gradients = _new_gradients(hidden, weight, labels.numel(), chunk, needed)
    if not labels.numel():
        torch._foreach_zero_(gradients)
    objective = Objective(ignore_index, label_smoothing, z_loss, softcap)
    dlosses, labels = dloss.reshape(-1).contiguous(), labels.reshape(-1).contiguous()
    _walk(as_rows(hidden), weight, labels, bias, objective, chunk, lse, gradients, needed, dlosses=dlosses)
    return tuple(gradient.to(hidden.dtype) for gradient in gradients)


def _backward_fake(
    dloss: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    gradients = _new_gradients(hidden, weight, labels.numel(), arguments[-4], arguments[-3:])
    return tuple(gradient.to(hidden.dtype) for gradient in gradients)


_NEEDED = "bool hidden_grad, bool weight_grad, bool bias_grad"

linear_cross_entropy_op = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, int ignore_index,"
    f" float label_smoothing, float z_loss, float? softcap, str reduction, int chunk, {_NEEDED})"
    " -> (Tensor loss, Tensor lse, Tensor count, Tensor dhidden, Tensor dweight, Tensor dbias)",
    kernel=_forward, pytorch=_forward, fake=_fake, flops=flops.linear_cross_entropy, check=_require_labels,
)  # fmt: skip
linear_cross_entropy_backward_op = register(
    "linear_cross_entropy_backward(Tensor dloss, Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor lse,"
    f" int ignore_index, float label_smoothing, float z_loss, float? softcap, int chunk, {_NEEDED})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    kernel=_backward, pytorch=_backward, fake=_backward_fake, flops=flops.linear_cross_entropy_backward,
)  # fmt: skip


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        *objective, reduction, chunk = options[:-3]
        ctx.needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        needed = (False,) * 3 if reduction == "none" else ctx.needed
        outputs = below_autograd(linear_cross_entropy_op, hidden, weight, labels, bias, *options[:-3], *needed)
        _, lse, count, *gradients = outputs
        ctx.mark_non_differentiable(lse, count, *gradients)
        ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be allocated and written
        ctx.reduction, ctx.options = reduction, (*objective, chunk)
        if reduction == "none":
            ctx.save_for_backward(hidden, weight, labels, bias, lse)
        else:
            ctx.save_for_backward(hidden, weight, labels, bias, count)
            ctx.gradients = gradients
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.reduction == "none":
            gradients = linear_cross_entropy_backward_op(dloss, *ctx.saved_tensors, *ctx.options, *ctx.needed)
        else:
            *inputs, count = ctx.saved_tensors
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:  # given away by the backward pass before this one
                *objective, chunk = ctx.options
                _, _, _, *gradients = linear_cross_entropy_op(*inputs, *objective, ctx.reduction, chunk, *ctx.needed)
            # where no label counts the gradients are zero, and shall not be divided by it
            scale = dloss / count.clamp(min=1) if ctx.reduction == "mean" else dloss
            # those that the list and the call alone refer to; who called the op itself may hold them, and who traces this too
            free = [type(gradients[i]) is Tensor and sys.getrefcount(gradients[i]) == 2 for i in range(3)]
            gradients = [
                _scaled(gradient, scale, inputs[0].dtype, in_place=mine)
                for gradient, mine in zip(gradients, free, strict=True)
            ]
        dhidden, dweight, dbias = (g if need else None for g, need in zip(gradients, ctx.needed, strict=True))
        return dhidden, dweight, None, dbias, *(None,) * 9


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """In one pass. A scalar is rounded to the dtype of the gradient first, unless it is a CPU's: 18 ms where a vector of one took 83."""
    same = gradient.dtype == dtype
    out = gradient if same and in_place else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale.reshape(() if same and gradient.is_cpu else 1), out=out)


register_autograd(linear_cross_entropy_op, _LinearCrossEntropy)
register_autocast(linear_cross_entropy_op)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:  # fmt: skip
    """The cross entropy of hidden @ weight.T + bias, without storing the logits of all tokens at once.

    Args:
        hidden: (..., in_features), float16, bfloat16 or float32 (float64 on the CPU).
        weight: (vocab, in_features), of hidden's dtype.
        labels: (...,), int64: the class of each token, or `ignore_index`.
        bias: (vocab,), of hidden's dtype.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as in `cross_entropy`.

    Returns:
        float32 (float64 for float64): a scalar, or (...,) for "none". The mean over no tokens is NaN, as PyTorch's; its
        gradient is zero.

    Under `torch.autocast`, `hidden`, `weight` and `bias` are cast as `F.linear` casts them.

    Raises:
        TypeError: a tensor is not floating point, `labels` is not int64, or `hidden`, `weight` and `bias` differ in dtype.
        ValueError: a shape, device or option does not fit; on the CPU, a label is out of range. On a GPU a label out of
            range makes the loss and the gradients NaN.
    """
    require_floating(hidden=hidden, weight=weight)
    require_floating_or_none(bias=bias)
    require_same_device(hidden=hidden, weight=weight, bias=bias)
    if hidden.ndim == 0:
        raise ValueError("hidden must have at least one dimension, got a scalar")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (vocab, {hidden.shape[-1]}), vocab > 0, got {tuple(weight.shape)}")
    if bias is not None:
        require_shape("bias", bias, weight.shape[:1])
    require_loss_arguments("hidden", hidden, labels, ignore_index, label_smoothing, z_loss, softcap, reduction)
    return call(
        linear_cross_entropy_op,
        hidden, weight, labels, bias, ignore_index, label_smoothing, z_loss, softcap, reduction,
        chunk_tokens(hidden.shape[-1]), False, False, False,
    )[0]  # fmt: skip
