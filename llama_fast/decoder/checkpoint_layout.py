"""Where each stored tensor of a checkpoint lies in the parameters of a decoder: data, for reading and for writing.

The decoder keeps q, k, v as rows of one matrix and gate, up as rows of another; files keep them apart (Phi-3 does not).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import DecoderConfig


@dataclass(frozen=True)
class Slot:
    """Where a stored tensor of `shape` lies in a parameter of the decoder: from `row`, `column` on.

    `interleaved_heads`: the rows of each of so many heads are stored as Meta does, pairs of a rotation side by side, and
    become first the first elements of all pairs, then the second ones.
    """

    parameter: str
    shape: tuple[int, ...]
    row: int = 0
    column: int = 0
    interleaved_heads: int = 0

    def of(self, decoder: nn.Module) -> Tensor:
        """The part of the parameter, a view; of a packed one a copy."""
        parameter = decoder.get_parameter(self.parameter).detach()
        part = (parameter.to_dense() if parameter.is_mkldnn else parameter).narrow(0, self.row, self.shape[0])
        return part if part.ndim == 1 else part.narrow(1, self.column, self.shape[1])

    def fill(self, decoder: nn.Module, stored: Tensor) -> None:
        part = self.of(decoder)
        if self.interleaved_heads:
            pairs = self.shape[0] // self.interleaved_heads // 2
            part = part.view(self.interleaved_heads, 2, pairs, -1)
            stored = stored.view(self.interleaved_heads, pairs, 2, -1).transpose(1, 2)
        part.copy_(stored)

    def stored(self, decoder: nn.Module) -> Tensor:
        """The part as it is stored: what `fill` would be given for it."""
        part = self.of(decoder)
        if not self.interleaved_heads:
            return part
        pairs = self.shape[0] // self.interleaved_heads // 2
        return part.view(self.interleaved_heads, 2, pairs, -1).transpose(1, 2).reshape(self.shape)


def huggingface_slots(config: DecoderConfig) -> dict[str, Slot]:
    """The place of each tensor of a Hugging Face checkpoint, by its name there."""
    hidden, vocab = config.hidden_size, config.vocab_size
    slots = {"model.embed_tokens.weight": Slot("embedding.weight", (vocab, hidden))}
    for i in range(config.num_layers):
        slots |= _layer_slots(config, f"model.layers.{i}.", f"layers.{i}.")
    slots |= _norm_slots(config, "model.norm", "norm")
    if not config.tied_embeddings:
        slots["lm_head.weight"] = Slot("head.weight", (vocab, hidden))
    return slots


def _layer_slots(config: DecoderConfig, theirs: str, ours: str) -> dict[str, Slot]:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    attention, mlp = f"{ours}attention.", f"{ours}mlp."
    if config.model_type == "phi3":
        qkv, gate_up = {"qkv_proj": (0, q + 2 * kv)}, {"gate_up_proj": (0, 2 * inner)}
    else:
        qkv = {"q_proj": (0, q), "k_proj": (q, kv), "v_proj": (q + kv, kv)}
        gate_up = {"gate_proj": (0, inner), "up_proj": (inner, inner)}
    matrices = [(f"self_attn.{name}", f"{attention}qkv", *rows, hidden, config.qkv_bias) for name, rows in qkv.items()]
    matrices += [("self_attn.o_proj", f"{attention}output", 0, hidden, q, config.output_bias)]
    matrices += [(f"mlp.{name}", f"{mlp}gate_up", *rows, hidden, config.mlp_bias) for name, rows in gate_up.items()]
    matrices += [("mlp.down_proj", f"{mlp}down", 0, hidden, inner, config.mlp_bias)]

    slots = _norm_slots(config, f"{theirs}input_layernorm", f"{ours}attention_norm")
    slots |= _norm_slots(config, f"{theirs}post_attention_layernorm", f"{ours}mlp_norm")
    for name, parameter, row, rows, columns, bias in matrices:
        slots[f"{theirs}{name}.weight"] = Slot(f"{parameter}.weight", (rows, columns), row)
        if bias:
            slots[f"{theirs}{name}.bias"] = Slot(f"{parameter}.bias", (rows,), row)
    if config.head_norm:
        slots[f"{theirs}self_attn.q_norm.weight"] = Slot(f"{attention}query_norm.weight", (head_dim,))
        slots[f"{theirs}self_attn.k_norm.weight"] = Slot(f"{attention}key_norm.weight", (head_dim,))
    return slots


def _norm_slots(config: DecoderConfig, theirs: str, ours: str) -> dict[str, Slot]:
    kinds = ("weight", "bias") if config.layer_norm else ("weight",)
    return {f"{theirs}.{kind}": Slot(f"{ours}.{kind}", (config.hidden_size,)) for kind in kinds}


def meta_slots(config: DecoderConfig, ranks: int, embedding_by_rows: bool) -> dict[str, Slot]:
    """The place of each tensor of Meta's checkpoints, named `<rank>:<name>`: a rank has some rows or some columns of each.

    Llama 1 and 2 split the columns of the embedding, later ones its rows. Norms are in every rank: the first is taken.
    """
    hidden, inner, vocab, head_dim = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    by_rows = [("output", "head", 0, vocab, hidden, 0)] * (not config.tied_embeddings)
    by_columns: list[tuple[str, str, int, int, int, int]] = []
    (by_rows if embedding_by_rows else by_columns).append(("tok_embeddings", "embedding", 0, vocab, hidden, 0))
    slots = {"0:norm.weight": Slot("norm.weight", (hidden,))}
    for i in range(config.num_layers):
        theirs, ours = f"layers.{i}.", f"layers.{i}."
        qkv, gate_up = f"{ours}attention.qkv", f"{ours}mlp.gate_up"
        by_rows += [
            (f"{theirs}attention.wq", qkv, 0, q, hidden, config.num_heads),
            (f"{theirs}attention.wk", qkv, q, kv, hidden, config.num_kv_heads),
            (f"{theirs}attention.wv", qkv, q + kv, kv, hidden, 0),
            (f"{theirs}feed_forward.w1", gate_up, 0, inner, hidden, 0),
            (f"{theirs}feed_forward.w3", gate_up, inner, inner, hidden, 0),
        ]
        by_columns += [
            (f"{theirs}attention.wo", f"{ours}attention.output", 0, hidden, q, 0),
            (f"{theirs}feed_forward.w2", f"{ours}mlp.down", 0, hidden, inner, 0),
        ]
        slots[f"0:{theirs}attention_norm.weight"] = Slot(f"{ours}attention_norm.weight", (hidden,))
        slots[f"0:{theirs}ffn_norm.weight"] = Slot(f"{ours}mlp_norm.weight", (hidden,))
    for rank in range(ranks):
        for name, parameter, row, rows, columns, heads in by_rows:
            rows //= ranks
            slot = Slot(f"{parameter}.weight", (rows, columns), row + rank * rows, 0, heads // ranks)
            slots[f"{rank}:{name}.weight"] = slot
        for name, parameter, row, rows, columns, _ in by_columns:
            columns //= ranks
            slots[f"{rank}:{name}.weight"] = Slot(f"{parameter}.weight", (rows, columns), row, rank * columns)
    return slots


def weight_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """How much memory the weights of a decoder take."""
    return sum(math.prod(slot.shape) for slot in huggingface_slots(config).values()) * dtype.itemsize
