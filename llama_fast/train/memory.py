"""What a step takes of the memory of each process, by arithmetic: what a run shows before its first step.

Counted are what lives from step to step (weights, gradients, the optimizer's states), and
the most that one micro-batch adds: what its forward pass keeps for backward, and the largest of what comes and goes with it. dp processes
share parameters out among them and gather a layer when it is its turn; tp processes share the matrices and heads of each layer.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch

from ..decoder.checkpoint_layout import huggingface_slots
from ..decoder.config import DecoderConfig
from ..reports.units import size
from .model import Recompute

_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights, gradients, states: this process's part. A sum of gradients that waits for others counts.
        gathered: whole layers, while they are needed: 0 in one process.
        activations: what one micro-batch adds at most, weights cast to the dtype it computes in too.
    """

    weights: int
    gradients: int
    states: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.gathered + self.activations

    def __str__(self) -> str:
        parts = [f"{each.name} {size(getattr(self, each.name))}" for each in fields(self) if getattr(self, each.name)]
        return f"{size(self.total)}: {', '.join(parts)}"


def training_memory(
    config: DecoderConfig, *, tokens: int, dtype: torch.dtype = torch.float32, recompute: Recompute = "none",
    weights: torch.dtype = torch.float32, adapters: int | None = None, optimizer: Literal["adamw", "muon"] = "adamw",
    sums: int = 1, dp: int = 1, tp: int = 1,
) -> Memory:  # fmt: skip
    """Of a process that trains all weights, or adapters beside them.

    Args:
        tokens: of a micro-batch.
        dtype: what it computes in; `weights`: what weights, gradients and states are kept in.
        adapters: how many float32 parameters are trained instead, by AdamW; None: no adapters.
        sums: how many gradients live at a time: see `sums_at_once`.
        dp, tp: processes that share parameters and those that share matrices: dp x tp of them.
    """
    layer, root = _Part.of_layer(config, tp), _Part.of_root(config)
    matrices, others = config.num_layers * layer.matrices, config.num_layers * layer.others + root.elements
    states = (matrices if optimizer == "muon" else 2 * matrices) + 2 * others
    kept, trained, element = matrices + others, matrices + others, weights.itemsize
    if adapters is not None:
        trained, states, element = adapters, 2 * adapters, _FLOAT32
    # the root stays; of layers there are this one and the next, and a gradient before it is cut
    gathered = 0 if dp == 1 else root.elements + 2 * layer.elements + max(root.elements, layer.elements)
    return Memory(
        weights=weights.itemsize * -(-kept // dp) + _FLOAT32 * -(-(adapters or 0) // dp),
        gradients=element * -(-trained // dp) * sums,
        states=element * -(-states // dp),
        gathered=weights.itemsize * gathered,
        activations=_activations(config, tokens, dtype, recompute, tp, casts=dtype != weights),
    )


def sums_at_once(micro_batches: int, *, exact: bool) -> int:
    """How many gradients a step's accumulation has at a time: see `optimizer.GradientSum`."""
    return micro_batches.bit_length() if exact else 1


@dataclass(frozen=True)
class _Part:
    """Elements of parameters that a process computes with: matrices of layers, and all else."""

    matrices: int
    others: int

    @property
    def elements(self) -> int:
        return self.matrices + self.others

    @classmethod
    def of_layer(cls, config: DecoderConfig, tp: int) -> "_Part":
        shapes = [slot.shape for name, slot in huggingface_slots(config).items() if name.startswith("model.layers.0.")]
        matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        return cls(matrices // tp, sum(math.prod(shape) for shape in shapes) - matrices)

    @classmethod
    def of_root(cls, config: DecoderConfig) -> "_Part":
        """The embedding, the last norm, and the head if it has weights of its own: no one cuts them."""
        named = huggingface_slots(config).items()
        return cls(0, sum(math.prod(slot.shape) for name, slot in named if not name.startswith("model.layers.")))


def _activations(
    config: DecoderConfig, tokens: int, dtype: torch.dtype, recompute: Recompute, tp: int, *, casts: bool
) -> int:
    """See `model` for what there is: of each layer x, two norms and their sum, q, k, v and what was attended, gate, up and their product."""
    hidden, inner, element = config.hidden_size, config.intermediate_size // tp, dtype.itemsize
    q, kv = config.num_heads * config.head_dim // tp, config.num_kv_heads * config.head_dim // tp
    lse = 4 * config.num_heads // tp
    whole = tokens * (element * (4 * hidden + 2 * q + 2 * kv + 3 * inner) + 2 * 4 + lse)
    products = tokens * (element * (2 * hidden + 2 * q + 2 * kv + 2 * inner) + lse)
    kept = {"none": whole, "selective": products, "full": tokens * element * hidden}[recompute]
    # x and the gradient of the last norm; the angles of positions; ids, labels and positions
    rest = tokens * (2 * element * hidden + 2 * 4 * config.head_dim + 3 * 8)
    head = config.vocab_size * hidden
    logits = min(tokens, max(1024, hidden)) * config.vocab_size * element
    layers = config.num_layers if recompute == "none" else 1
    cast = element * (layers * _Part.of_layer(config, tp).elements + head) if casts else 0
    passing = logits if recompute == "none" else max(logits, whole)
    return config.num_layers * kept + rest + _FLOAT32 * head + cast + passing
