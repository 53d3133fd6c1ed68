"""Dropout that keeps no state: what is left out is a function of a key and of where in the model it is.

    y = x * kept / (1 - share)        kept = uniform(key, site) >= share

The key is made of a seed and of what the step learns from, so a run that goes on, or has its rows on other ranks, leaves out the same. The
backward pass does the same to the gradient, and makes what it keeps again: no mask stays in memory.
"""

import hashlib

import torch
from torch import Tensor, nn


def make_key(seed: int, number: int) -> Tensor:
    """The key of what has this number, an int64 scalar on the CPU."""
    return torch.tensor(_hash(f"{seed} {number}"))


class Dropout(nn.Module):
    """Leaves out this share of its elements, where it is given a key.

    Attributes:
        site: what it is told from others by: see `name_sites`.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.site = share, 0

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        if key is None or not self.share:
            return x
        y: Tensor = _dropout(x, key, self.site, self.share)
        return y


def name_sites(model: nn.Module) -> None:
    """Gives each dropout of a model a site made of its name."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.site = _hash(name)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@torch.library.custom_op("llama_fast::dropout", mutates_args=())
def _dropout(x: Tensor, key: Tensor, site: int, share: float) -> Tensor:
    # `rand` on a CPU is one thread's, whatever their number
    generator = torch.Generator(x.device).manual_seed(_hash(f"{key.item()} {site}"))
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= share
    return (x * kept).mul_(1 / (1 - share))


@_dropout.register_fake
def _(x: Tensor, key: Tensor, site: int, share: float) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
    _, key, ctx.site, ctx.share = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(key)


def _backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None, None]:
    (key,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return _dropout(dy, key, ctx.site, ctx.share), None, None, None  # type: ignore[attr-defined]


_dropout.register_autograd(_backward, setup_context=_keep)
