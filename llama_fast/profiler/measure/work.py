"""What must be done, counted from shapes: bytes that have to move and floating-point operations; and how long that takes at least."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...decoder.checkpoint_layout import huggingface_slots
from ...decoder.config import DecoderConfig


@dataclass(frozen=True)
class Work:
    """Bytes read and written if each input is read once and each output written once, and FLOPs (a multiply-add is two)."""

    read: int = 0
    written: int = 0
    flops: int = 0

    @classmethod
    def moving(cls, *, reads: Iterable[Tensor], writes: Iterable[Tensor], flops: int = 0) -> "Work":
        """Reading and writing whole tensors."""
        return cls(sum(map(_bytes, reads)), sum(map(_bytes, writes)), flops)

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Work") -> "Work":
        return Work(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def __mul__(self, times: int) -> "Work":
        return Work(self.read * times, self.written * times, self.flops * times)


NO_WORK = Work()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def attended_pairs(seq_q: int, seq_k: int, *, causal: bool = True, window: int | None = None) -> int:
    """Pairs of a query and a key it attends to; queries are aligned to the end of the keys."""
    pairs = 0
    for i in range(seq_k - seq_q, seq_k):
        last = i if causal else seq_k - 1
        first = 0 if window is None else max(0, i - window + 1)
        pairs += max(0, last - first + 1) if i >= 0 or not causal else 0
    return pairs


def attention_flops(pairs: int, heads: int, head_dim: int, *, backward: bool = False) -> int:
    """Of `pairs` a head: two products forward (scores, values); five more backward (scores again, dv, dp, dq, dk)."""
    return (14 if backward else 4) * pairs * heads * head_dim


# Whole models. Activations between layers are not counted: they stay in caches where a model is fused well, and are small beside the weights.


def weight_elements(config: DecoderConfig) -> tuple[int, int]:
    """(all, those of matrices) that a forward pass reads: without the embedding table, but with a head that is tied to it."""
    shapes = {name: slot.shape for name, slot in huggingface_slots(config).items()}
    embedding = math.prod(shapes.pop("model.embed_tokens.weight"))
    tied = embedding if config.tied_embeddings else 0
    matrices = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    return sum(map(math.prod, shapes.values())) + tied, matrices + tied


def decoding_step_work(
    config: DecoderConfig, batch: int, context: int, dtype: torch.dtype, *, cache_dtype: torch.dtype | None = None
) -> Work:
    """Of a step that computes one token for each of `batch` sequences, and attends to `context` keys, its own among them.

    It reads the weights once, a row of the embedding a sequence, and the keys and values in their windows; it writes its own.
    """
    elements, matrices = weight_elements(config)
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * (cache_dtype or dtype).itemsize  # of a token and layer
    pairs = sum(min(context, window or context) for window in config.windows)
    read = (elements + batch * config.hidden_size) * dtype.itemsize + batch * (pairs - config.num_layers) * kv_bytes
    flops = batch * (2 * matrices + attention_flops(pairs, config.num_heads, config.head_dim))
    return Work(read, batch * config.num_layers * kv_bytes, flops)


def prompt_work(config: DecoderConfig, tokens: int, dtype: torch.dtype, *, batch: int = 1) -> Work:
    """Of `batch` prompts of `tokens` each, up to the logits after the last token of each. What is kept in a cache is not counted."""
    elements, matrices = weight_elements(config)
    head = config.vocab_size * config.hidden_size
    pairs = sum(attended_pairs(tokens, tokens, window=window) for window in config.windows)
    attention = attention_flops(pairs, config.num_heads, config.head_dim)
    read = (elements + batch * tokens * config.hidden_size) * dtype.itemsize
    written = batch * config.vocab_size * dtype.itemsize
    return Work(read, written, batch * (2 * (matrices - head) * tokens + 2 * head + attention))


def layer_work(config: DecoderConfig, tokens: int, dtype: torch.dtype, *, training: bool = False) -> Work:
    """Of the first layer of a model, for one sequence: forward, or forward and backward with the gradients of all weights."""
    shapes = [slot.shape for name, slot in huggingface_slots(config).items() if name.startswith("model.layers.0.")]
    elements = sum(map(math.prod, shapes))
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    x = tokens * config.hidden_size
    pairs = attended_pairs(tokens, tokens, window=config.windows[0])
    attention = attention_flops(pairs, config.num_heads, config.head_dim, backward=training)
    flops = (6 if training else 2) * matrices * tokens + attention
    if not training:
        return Work((elements + x) * dtype.itemsize, x * dtype.itemsize, flops)
    # backward reads weights and x again and the gradient of y, and writes those of the weights and of x
    return Work((2 * elements + 3 * x) * dtype.itemsize, (elements + 2 * x) * dtype.itemsize, flops)


def training_flops(config: DecoderConfig, seq_len: int, *, frozen: bool = False) -> int:
    """Of a token, by the rule that MFU is told by: 6 (P - P_emb) + 12 L D S. It counts attention as if it were not causal.

    Weights that are `frozen` beside adapters have no gradient of their own: 4 (P - P_emb). The adapters' products are not counted. A head that is tied to the embedding table counts: it multiplies. Source: Chowdhery et al., PaLM, 2022 (arXiv:2204.02311), B.
    """
    elements, _ = weight_elements(config)
    return (4 if frozen else 6) * elements + 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
