"""The losses of tokens and their gradient in PyTorch's ops: what the kernels of `cross_entropy.py` compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import Objective
from .rows import accumulation_dtype


def losses_pytorch(logits: Tensor, labels: Tensor, losses: Tensor, lse: Tensor, objective: Objective) -> None:
    """Writes `losses` (M,) and `lse` (M, 2) of the rows of `logits` (M, V)."""
    ignore_index, smoothing, z_loss, softcap = objective
    z = _capped(logits, softcap)
    log_p = torch.log_softmax(z, -1)
    loss = F.nll_loss(log_p, labels, ignore_index=ignore_index, reduction="none")
    lse[:, 0], lse[:, 1] = z.amax(-1), -log_p.amax(-1)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(-1)
    if z_loss:
        loss += z_loss * lse.sum(-1).square()
    losses.copy_(loss.masked_fill_(labels == ignore_index, 0.0))


def gradient_pytorch(
    logits: Tensor, labels: Tensor, lse: Tensor, dlogits: Tensor, objective: Objective, *,
    dloss: Tensor | None, count: Tensor | None,
) -> None:  # fmt: skip
    """Writes `dlogits` (M, V), which may be `logits`, given the gradient of each loss (None for 1), over `count`."""
    ignore_index, smoothing, z_loss, softcap = objective
    counts = labels != ignore_index
    g = counts.to(lse.dtype)
    if dloss is not None:
        g *= dloss
    if count is not None:
        g = torch.where(counts, g / count, 0.0)
    z = _capped(logits, softcap)
    dz = torch.softmax(z, -1)
    if z_loss:
        dz *= 1 + 2 * z_loss * lse.sum(-1, keepdim=True)
    if smoothing:
        dz -= smoothing / logits.shape[-1]
    label = torch.where(counts, labels, 0).unsqueeze(-1)
    dz.scatter_add_(-1, label, torch.full_like(label, smoothing - 1.0, dtype=dz.dtype))
    if softcap is not None:
        dz *= 1 - (z / softcap).square()
    torch.mul(dz, g.unsqueeze(-1), out=dlogits)
    if not counts.all():
        dlogits[~counts] = 0.0  # also where the logits are NaN


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    z = logits.to(accumulation_dtype(logits))
    return z if softcap is None else softcap * torch.tanh(z / softcap)
