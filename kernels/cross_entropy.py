"""Cross entropy of logits, with label smoothing, z-loss and softcap.

    z = softcap * tanh(logits / softcap)        lse = log(sum over classes of exp(z))
    loss = lse - (1 - label_smoothing) * z[label] - label_smoothing * mean(z) + z_loss * lse^2

Forward: a program owns BLOCK_M rows and walks along them; each lane keeps the largest value it has seen and its sum
relative to that, over vectors of 8 classes (on a CPU, whole tiles): 9 exponentials for 8 elements, and no exchange between
threads before the end of the row. 2V bytes are read a row in bf16, once. A second kernel, one program, adds the losses up in a
fixed order.

Backward, with p = exp(z - lse) and g the gradient of the token's loss:

    dlogits = g * (1 - (z / softcap)^2) * ((1 + 2 * z_loss * lse) * p - (1 - label_smoothing) * [label] - label_smoothing / V)

Kept for backward: logits, labels, and lse as the pair (largest z, lse - largest z), which the sum would round: at lse = 50
every p would be wrong by up to 2e-6 of itself, and p - 1 of a sure prediction by far more. 2V bytes are read and 2V written
a row, in one pass; rows whose label is ignored are written without being read. The loss is float32 whatever the dtype of the
logits.

Label smoothing: Szegedy et al., 2015 (arXiv:1512.00567). z-loss: Chowdhery et al., PaLM, 2022 (arXiv:2204.02311).
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import tanh
from .cpu import runs_natively
from .cross_entropy_pytorch import gradient_pytorch, losses_pytorch
from .launch import INTERPRETED, Gpu, LaunchPlan, as_rows, cdiv, gpu_of, next_power_of_2
from .library import below_autograd, call, register, register_autograd
from .objective import Objective, require_labels, require_loss_arguments
from .rows import accumulation_dtype
from .triton_compat import tl, triton
from .validate import require_floating, require_kernel_dtype

TILE = 4096
"""Elements of a program's tile: 16 a thread with 8 warps, two 16-byte loads in bf16."""


@triton.jit
def _exp(b_x):
    """exp in two instructions, flushing denormals to zero; `tl.exp` takes five, to keep them."""
    return tl.exp2(b_x * 1.4426950408889634)


@triton.jit
def cross_entropy_kernel(
    p_logits, p_labels, p_loss, p_lse, logits_stride, M, V, ignore_index, label_smoothing, z_loss, softcap,
    BLOCK_M: tl.constexpr, LANES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.load(p_labels + o_m, mask=o_m < M, other=ignore_index)
    counts = label != ignore_index  # [BLOCK_M]
    p_rows = p_logits + (o_m * logits_stride)[:, None, None]
    o_v = (tl.arange(0, LANES) * CLASSES)[None, :, None] + tl.arange(0, CLASSES)[None, None, :]

    b_max = tl.full([BLOCK_M, LANES], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M, LANES], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_M, LANES], dtype=tl.float32)
    for start in range(0, V, LANES * CLASSES):
        mask = counts[:, None, None] & (start + o_v < V)
        b_z = tl.load(p_rows + start + o_v, mask=mask, other=float("-inf")).to(tl.float32)  # [BLOCK_M, LANES, CLASSES]
        if softcap is not None:
            b_z = tl.where(mask, softcap * tanh(b_z / softcap), float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_z, axis=2))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # nothing but -inf so far
        b_sum = b_sum * _exp(b_max - b_shift) + tl.sum(_exp(b_z - b_shift[:, :, None]), axis=2)
        b_max = b_new_max
        if label_smoothing is not None:
            b_total += tl.sum(tl.where(mask, b_z, 0.0), axis=2)

    row_max = tl.max(b_max, axis=1)  # [BLOCK_M]
    row_shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(b_sum * _exp(b_max - row_shift[:, None]), axis=1)
    log_sum = tl.log(tl.where(counts, row_sum, 1.0))
    # NaN where the label is out of range: a loss that shows it, without reading out of bounds
    b_label_z = tl.load(
        p_logits + o_m * logits_stride + label, mask=counts & (label >= 0) & (label < V), other=float("nan")
    ).to(tl.float32)
    if softcap is not None:
        b_label_z = softcap * tanh(b_label_z / softcap)
    lse = row_shift + log_sum
    tl.store(p_lse + 2 * o_m, row_shift, mask=o_m < M)
    tl.store(p_lse + 2 * o_m + 1, log_sum, mask=o_m < M)
    # log_sum - (z - max) rather than lse - z: the difference of two numbers of the size of the loss
    loss = log_sum - (b_label_z - row_shift)
    if label_smoothing is not None:
        loss += label_smoothing * (b_label_z - tl.sum(b_total, axis=1) / V)
    loss += z_loss * lse * lse
    tl.store(p_loss + o_m, tl.where(counts, loss, 0.0), mask=o_m < M)


@triton.jit
def reduce_losses_kernel(
    p_losses, p_labels, p_loss, p_count, M, ignore_index, MEAN: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The sum or mean of the losses, in one program; the mean is NaN where no label counts, as PyTorch's."""
    b_loss = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_count = tl.zeros([BLOCK_M], dtype=tl.int32)
    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_loss += tl.load(p_losses + o_m, mask=o_m < M, other=0.0)
        b_count += (tl.load(p_labels + o_m, mask=o_m < M, other=ignore_index) != ignore_index).to(tl.int32)
    total = tl.sum(b_loss, axis=0)
    if MEAN:
        count = tl.sum(b_count, axis=0).to(tl.float32)
        total = tl.where(count == 0.0, float("nan"), total / tl.maximum(count, 1.0))
        tl.store(p_count, count)
    tl.store(p_loss, total)


@triton.jit
def cross_entropy_backward_kernel(
    p_logits, p_labels, p_lse, p_dloss, p_count, p_dlogits, logits_stride, dlogits_stride, dloss_stride, M, V,
    ignore_index, label_smoothing, z_loss, softcap,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile. `p_dlogits` may be `p_logits`: each element is read before it is written, by the same thread."""
    class_blocks = tl.cdiv(V, BLOCK_V)
    o_m = (tl.program_id(0) // class_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_v = tl.program_id(0) % class_blocks * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    label = tl.load(p_labels + o_m, mask=o_m < M, other=ignore_index)  # [BLOCK_M, 1]
    counts = label != ignore_index
    row_shift = tl.load(p_lse + 2 * o_m, mask=o_m < M, other=0.0)
    log_sum = tl.load(p_lse + 2 * o_m + 1, mask=o_m < M, other=0.0)
    g = tl.where((label >= 0) & (label < V), 1.0, float("nan"))
    if p_dloss is not None:
        g *= tl.load(p_dloss + o_m * dloss_stride, mask=o_m < M, other=0.0)
    if p_count is not None:
        g /= tl.load(p_count)

    b_z = tl.load(p_logits + o_m * logits_stride + o_v, mask=counts & (o_v < V), other=0.0).to(tl.float32)
    if softcap is not None:
        b_tanh = tanh(b_z / softcap)
        b_z = softcap * b_tanh
    target = 1.0  # of the label's class
    b_dz = (1.0 + 2.0 * z_loss * (row_shift + log_sum)) * _exp(b_z - row_shift - log_sum)  # [BLOCK_M, BLOCK_V]
    if label_smoothing is not None:
        target -= label_smoothing
        b_dz -= label_smoothing / V
    b_dz = g * (b_dz - tl.where(o_v == label, target, 0.0))
    if softcap is not None:
        b_dz *= 1.0 - b_tanh * b_tanh
    tl.store(p_dlogits + o_m * dlogits_stride + o_v, tl.where(counts, b_dz, 0.0), mask=(o_m < M) & (o_v < V))


def plan_cross_entropy(
    logits: Tensor, labels: Tensor, losses: Tensor, lse: Tensor, objective: Objective, *, gpu: Gpu
) -> LaunchPlan:
    """The loss (M,) and lse (M, 2) of each row of `logits` (M, V), whose rows are contiguous; `labels` (M,) int64."""
    m, vocab = logits.shape
    block_v = min(TILE, next_power_of_2(max(8, vocab)))
    block_m = TILE // block_v
    lanes = 1 if gpu.is_cpu else block_v // 8  # a CPU has one lane, as wide as the tile: it took a seventh of the time
    return LaunchPlan(
        cross_entropy_kernel,
        grid=(cdiv(m, block_m),),
        arguments=dict(
            p_logits=logits, p_labels=labels, p_loss=losses, p_lse=lse, logits_stride=logits.stride(0), M=m, V=vocab,
            **objective.arguments(),
        ),
        constants=dict(BLOCK_M=block_m, LANES=lanes, CLASSES=block_v // lanes),
        num_warps=8,
    )  # fmt: skip


def plan_reduce_losses(
    losses: Tensor, labels: Tensor, loss: Tensor, count: Tensor | None, ignore_index: int
) -> LaunchPlan:
    """`loss` = the sum of `losses` (M,); with `count`, which gets the number of labels that count, their mean."""
    return LaunchPlan(
        reduce_losses_kernel,
        grid=(1,),
        arguments=dict(
            p_losses=losses, p_labels=labels, p_loss=loss, p_count=count, M=losses.numel(), ignore_index=ignore_index
        ),
        constants=dict(MEAN=count is not None, BLOCK_M=4096),
        num_warps=16,
    )


def plan_cross_entropy_backward(
    logits: Tensor, labels: Tensor, lse: Tensor, dlogits: Tensor, objective: Objective, *,
    dloss: Tensor | None, count: Tensor | None,
) -> LaunchPlan:  # fmt: skip
    """`dlogits` (M, V), which may be `logits`; `dloss` is (M,), or one number for all, or None for 1; over `count`."""
    m, vocab = logits.shape
    block_v = min(TILE, next_power_of_2(vocab))
    block_m = TILE // block_v
    return LaunchPlan(
        cross_entropy_backward_kernel,
        grid=(cdiv(m, block_m) * cdiv(vocab, block_v),),
        arguments=dict(
            p_logits=logits, p_labels=labels, p_lse=lse, p_dloss=dloss, p_count=count, p_dlogits=dlogits,
            logits_stride=logits.stride(0), dlogits_stride=dlogits.stride(0),
            dloss_stride=0 if dloss is None or dloss.ndim == 0 else dloss.stride(0), M=m, V=vocab,
            **objective.arguments(),
        ),
        constants=dict(BLOCK_M=block_m, BLOCK_V=block_v),
        num_warps=8,
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    m, loss = 8192, torch.empty((), device="meta")
    labels, losses = torch.empty(m, dtype=torch.int64, device="meta"), torch.empty(m, device="meta")
    lse = torch.empty(m, 2, device="meta")
    yield str(m), plan_reduce_losses(losses, labels, loss, loss, -100)
    for vocab, smoothing, softcap in ((128256, 0.0, None), (256000, 0.1, 30.0)):
        objective = Objective(-100, smoothing, 0.0, softcap)
        logits = torch.empty(m, vocab, dtype=torch.bfloat16, device="meta")
        shape = f"{m}x{vocab}" + ("+smoothing+softcap" if smoothing else "")
        yield shape, plan_cross_entropy(logits, labels, losses, lse, objective, gpu=gpu)
        yield shape, plan_cross_entropy_backward(logits, labels, lse, logits, objective, dloss=loss, count=loss)


def losses_kernel(logits: Tensor, labels: Tensor, losses: Tensor, lse: Tensor, objective: Objective) -> None:
    """Writes `losses` (M,) and `lse` (M, 2) of the rows of `logits` (M, V)."""
    plan_cross_entropy(logits, labels, losses, lse, objective, gpu=gpu_of(logits.device)).launch()


def gradient_kernel(
    logits: Tensor, labels: Tensor, lse: Tensor, dlogits: Tensor, objective: Objective, *,
    dloss: Tensor | None, count: Tensor | None,
) -> None:  # fmt: skip
    """Writes `dlogits` (M, V), which may be `logits`, given the gradient of each loss (None for 1), over `count`."""
    plan_cross_entropy_backward(logits, labels, lse, dlogits, objective, dloss=dloss, count=count).launch()


def _require_labels(logits: Tensor, labels: Tensor, ignore_index: int, *_: Any) -> None:
    require_labels(labels, logits.shape[-1], ignore_index)


def _forward(
    write_losses: Callable[..., None], logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float | None, reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    objective = Objective(ignore_index, label_smoothing, z_loss, softcap)
    loss, lse, count = _fake(logits, labels, *objective, reduction)
    labels = labels.reshape(-1).contiguous()
    losses = loss.view(-1) if reduction == "none" else lse.new_empty(labels.numel())
    write_losses(as_rows(logits), labels, losses, lse, objective)
    if reduction != "none":
        reduce_losses(losses, labels, loss, count, reduction, ignore_index)
    return loss, lse, count


def reduce_losses(
    losses: Tensor, labels: Tensor, loss: Tensor, count: Tensor, reduction: str, ignore_index: int
) -> None:
    """Writes `loss` and, for the mean, `count`, from the `losses` of `labels`."""
    mean = reduction == "mean"
    if losses.is_cuda or INTERPRETED or runs_natively(losses):
        plan_reduce_losses(losses, labels, loss, count if mean else None, ignore_index).launch()
        return
    loss.copy_(losses.sum())
    if mean:
        count.copy_((labels != ignore_index).sum())
        loss /= count


def _kernel(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    require_kernel_dtype(logits=logits)
    return _forward(losses_kernel, logits, labels, *options)


def _pytorch(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(losses_pytorch, logits, labels, *options)


def _fake(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulation_dtype(logits)
    return (
        logits.new_empty(labels.shape if reduction == "none" else (), dtype=dtype),
        logits.new_empty((labels.numel(), 2), dtype=dtype),
        logits.new_empty(() if reduction == "mean" else 0, dtype=dtype),
    )


def _backward(
    write_gradient: Callable[..., None], dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, count: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    write_gradient(
        as_rows(logits), labels.reshape(-1).contiguous(), lse, as_rows(dlogits),
        Objective(ignore_index, label_smoothing, z_loss, softcap),
        dloss=dloss.reshape(-1).contiguous() if dloss.ndim else dloss, count=None if count.ndim else count,
    )  # fmt: skip
    return dlogits


def _backward_kernel(*arguments: Any) -> Tensor:
    return _backward(gradient_kernel, *arguments)


def _backward_pytorch(*arguments: Any) -> Tensor:
    return _backward(gradient_pytorch, *arguments)


def _backward_fake(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


cross_entropy_op = register(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss, float? softcap,"
    " str reduction) -> (Tensor loss, Tensor lse, Tensor count)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, check=_require_labels,
)  # fmt: skip
cross_entropy_backward_op = register(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, Tensor count, int ignore_index,"
    " float label_smoothing, float z_loss, float? softcap) -> Tensor",
    kernel=_backward_kernel, pytorch=_backward_pytorch, fake=_backward_fake,
)  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, lse, count = below_autograd(cross_entropy_op, logits, labels, *options)
        ctx.mark_non_differentiable(lse, count)
        ctx.set_materialize_grads(False)  # zeros for outputs without a gradient would be allocated and written
        ctx.save_for_backward(logits, labels, lse, count)
        ctx.objective = options[:-1]
        return loss, lse, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * len(ctx.needs_input_grad)
        return cross_entropy_backward_op(dloss, *ctx.saved_tensors, *ctx.objective), *(None,) * 6


register_autograd(cross_entropy_op, _CrossEntropy)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:  # fmt: skip
    """Cross entropy of softcap * tanh(logits / softcap) with the labels, plus z_loss * logsumexp^2, of each token.

    Args:
        logits: (..., vocab), float16, bfloat16 or float32 (float64 on the CPU). Rows need one stride: `logits[:, :-1]` of
            a batch is copied, so shift the labels instead.
        labels: (...,), int64: the class of each token, or `ignore_index`.
        ignore_index: tokens with this label have no loss and no gradient.
        label_smoothing: the part of the target, 0 to 1, that is spread over all classes.
        z_loss: weight of the squared logsumexp.
        softcap: positive, or None for none.
        reduction: "mean" over the tokens that count, "sum", or "none".

    Returns:
        float32 (float64 for float64): a scalar, or (...,) for "none". The mean over no tokens is NaN, as PyTorch's; its
        gradient is zero.

    Raises:
        TypeError: `logits` is not floating point or `labels` not int64.
        ValueError: a shape, device or option does not fit; on the CPU, a label is out of range. On a GPU the check would
            wait for the device: there a label out of range makes the loss and the gradient of its token NaN.
    """
    require_floating(logits=logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., vocab) with at least one class, got {tuple(logits.shape)}")
    require_loss_arguments("logits", logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction)
    return call(cross_entropy_op, logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction)[0]
