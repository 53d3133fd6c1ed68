"""What every op means, in plain PyTorch: readable, right in float64, slow. The oracle of tests and benchmarks."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + offset)."""
    h = x if residual is None else x + residual
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight + offset)
    return y if residual is None else (y, h)
