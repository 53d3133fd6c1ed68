"""What both cross entropies, of logits and of hidden states, take beside these: the loss of a token, its labels, and what is asked of them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .validate import require_same_device, require_shape


class Objective(NamedTuple):
    """What a token's loss is made of."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None

    def arguments(self) -> dict[str, Any]:
        """As the kernels take them: without smoothing, None leaves its work out."""
        return self._asdict() | dict(label_smoothing=self.label_smoothing or None)


def require_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Labels on the CPU must be classes, or `ignore_index`."""
    if not labels.numel():
        return
    lowest, highest = labels.aminmax()
    if lowest.item() >= 0 and highest.item() < vocab:
        return
    wrong = labels[((labels < 0) | (labels >= vocab)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(f"labels must lie in [0, {vocab}) or be ignore_index, {ignore_index}, got {wrong[0].item()}")


def require_loss_arguments(
    name: str, tokens: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float | None, reduction: str,
) -> None:  # fmt: skip
    """What the two cross entropies ask of their common arguments; `tokens`, called `name`, has a row for each label."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    require_same_device(**{name: tokens}, labels=labels)
    require_shape("labels", labels, tokens.shape[:-1])
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
