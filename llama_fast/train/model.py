"""The decoder as it is trained: parameters under Hugging Face's names, q, k, v and gate, up apart, over packed rows of tokens.

    x = embed_tokens[ids]
    for each layer:   h = o_proj(attention(rope(q_proj(norm(x)), k_proj(norm(x))), v_proj(norm(x))))
                      n, x = norm(h + x), h + x
                      x = x + down_proj(silu(gate_proj(n)) * up_proj(n))
    loss = cross_entropy(norm(x) @ lm_head, labels)

What a checkpoint holds does not depend on how the matrices are stored elsewhere, heads can be cut, and adapters find the names they know.
Parameters are float32, and each layer casts them to the dtype it computes in where it uses them: so every gradient is summed in
float32, also that of an embedding which is the head too. Whoever wants them in bfloat16 calls `to(torch.bfloat16)`.

Rows of tokens shorter than a tile are filled up with a sequence of their own, whose hidden states are cut off again: kernels are chosen by
how many rows there are, and so a sequence has the same bits alone as beside others.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .. import ops
from ..decoder.checkpoint_layout import huggingface_slots
from ..decoder.config import DecoderConfig
from ..decoder.model import Decoder, Embedding
from ..decoder.rotary import RotaryTable
from .dropout import Dropout, name_sites
from .ranks import assign, local

FEWEST_TOKENS = 128
"""The queries of an attention tile on a CPU; products of up to 16 rows have kernels of their own, too."""
Recompute = Literal["none", "selective", "full"]
"""What a layer computes again in its backward pass: nothing; all but products and attention; all from its input on."""

_KEPT = (torch.ops.llama_fast.linear.default, torch.ops.llama_fast.attention.default)


@dataclass(frozen=True)
class Packed:
    """Sequences side by side in one row of tokens; none sees another.

    Attributes:
        ids: (tokens,) int64.
        positions: (tokens,) int64, of each token in its own sequence.
        lengths: (tokens,) int64, of that sequence.
        cu_seqlens: (sequences + 1,) int32: where sequences begin, and the last one ends.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, ids: Tensor, lengths: Sequence[int]) -> "Packed":
        """From the tokens and how many each sequence has, at least one each."""
        counts = torch.tensor(lengths)
        starts = torch.tensor([0, *accumulate(lengths)])
        positions = torch.arange(len(ids)) - starts[:-1].repeat_interleave(counts)
        made = (positions, counts.repeat_interleave(counts), starts.int())
        return cls(ids, *(tensor.to(ids.device) for tensor in made))

    def filled_up(self) -> "Packed":
        """With one sequence more where there are fewer tokens than `FEWEST_TOKENS`."""
        missing = FEWEST_TOKENS - len(self.ids)
        if missing <= 0:
            return self
        return Packed(
            F.pad(self.ids, (0, missing)),
            torch.cat((self.positions, torch.arange(missing, device=self.ids.device))),
            F.pad(self.lengths, (0, missing), value=missing),
            F.pad(self.cu_seqlens, (0, 1), value=FEWEST_TOKENS),
        )


class Linear(nn.Module):
    """A product with a weight (out_features, in_features) that is cast to the dtype of what it multiplies."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """(tokens, out_features), with `residual` added. `key` is for what is random in the classes made from this one."""
        bias = None if self.bias is None else local(self.bias).to(x.dtype)
        y: Tensor = ops.linear(x, local(self.weight).to(x.dtype), bias, residual=residual)
        return y


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; with `residual` of the sum, which is returned too."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.rms_norm(x, local(self.weight).to(x.dtype), self.eps, residual=residual)


class Attention(nn.Module):
    """Grouped-query attention within each packed sequence."""

    def __init__(self, config: DecoderConfig, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, window
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv, bias=config.qkv_bias)
        self.o_proj = Linear(q, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.head_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.head_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, key: Tensor | None) -> Tensor:
        """(tokens, hidden) of normalised x (tokens, hidden)."""
        q, k, v = (
            project(x, key=key).view(len(x), -1, self.head_dim).transpose(0, 1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rope(q[None], k[None], cos[None], sin[None])
        attended = ops.attention(q[0], k[0], v, window=self.window, cu_seqlens_q=cu_seqlens)
        y: Tensor = self.o_proj(attended.transpose(0, 1).reshape(len(x), -1), key=key)
        return y


class MLP(nn.Module):
    """SwiGLU, and the sum with the residual, if it is given, in the epilogue of its last product."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor | None, key: Tensor | None) -> Tensor:
        inner = ops.swiglu(self.gate_proj(x, key=key), self.up_proj(x, key=key))
        y: Tensor = self.down_proj(inner, residual, key)
        return y


class Layer(nn.Module):
    """One decoder layer. `dropout` is the share of what it adds to the residual that is left out."""

    def __init__(self, config: DecoderConfig, window: int | None, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.attention_dropout, self.mlp_dropout = Dropout(dropout), Dropout(dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, key: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, key)
        normed, x = self.post_attention_layernorm(self.attention_dropout(attended, key), x)
        if key is None or not self.mlp_dropout.share:
            y: Tensor = self.mlp(normed, x, key)
            return y
        y = x + self.mlp_dropout(self.mlp(normed, None, key), key)
        return y


class Backbone(nn.Module):
    """Embedding, layers and last norm: what Hugging Face's names call `model`."""

    def __init__(self, config: DecoderConfig, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(Layer(config, window, dropout) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class TrainedDecoder(nn.Module):
    """A decoder to train, with uninitialised float32 parameters: see `initialise` and `fill`.

    Args:
        config: of a family whose files keep q, k, v and gate, up apart.
        dtype: what it computes in, float32 or bfloat16.
        recompute: what layers compute again in the backward pass instead of keeping it.
        dropout: the share of the embedding, and of what each layer adds to it, that is left out where a `key` is given.

    Raises:
        ValueError: the family is Phi-3 or StableLM.
    """

    def __init__(
        self, config: DecoderConfig, *, dtype: torch.dtype = torch.float32, recompute: Recompute = "none",
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if config.model_type == "phi3" or config.layer_norm:
            raise ValueError(
                f"models of the family {config.model_type} are not trained here: LLaMA, Mistral and Qwen are"
            )
        self.config, self.dtype, self.recompute = config, dtype, recompute
        self.model = Backbone(config, dropout)
        self.lm_head = None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size)
        self._rotary_tables: dict[torch.device, RotaryTable] = {}
        name_sites(self)

    def forward(
        self, packed: Packed, labels: Tensor, *, key: Tensor | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:  # fmt: skip
        """The sum of the losses of all labels (tokens,) int64 that are not -100: nats, a float32 scalar.

        `key`, an int64 scalar, is what dropout is a function of: without it nothing is left out.
        """
        return ops.linear_cross_entropy(
            self.hidden(packed, key), self.head_weight, labels,
            label_smoothing=label_smoothing, z_loss=z_loss, reduction="sum",
        )  # fmt: skip

    def hidden(self, packed: Packed, key: Tensor | None = None) -> Tensor:
        """The normalised hidden states (tokens, hidden), of the dtype it computes in."""
        tokens, packed = len(packed.ids), packed.filled_up()
        x = self.model.dropout(self.model.embed_tokens(packed.ids).to(self.dtype), key)
        cos, sin = self._rotary(packed.ids.device).rows(packed.positions, packed.lengths)
        for layer in self.model.layers:
            x = self._layer(layer, x, cos, sin, packed.cu_seqlens, key)
        normed: Tensor = self.model.norm(x)
        return normed[:tokens]

    def _rotary(self, device: torch.device) -> RotaryTable:
        """No buffer: it would be cast with the weights."""
        if device not in self._rotary_tables:
            self._rotary_tables[device] = RotaryTable(self.config, device)
        return self._rotary_tables[device]

    def _layer(self, layer: nn.Module, *arguments: Tensor | None) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            y: Tensor = layer(*arguments)
            return y
        options: dict[str, Any] = {}
        if self.recompute == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        y = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
        return y

    def compile_layers(self) -> None:
        """Gives each layer to `torch.compile`."""
        for layer in self.model.layers:
            layer.compile()

    def learnt(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name; they are the model's own, not copies."""
        return {name: each.detach() for name, each in self.named_parameters() if each.requires_grad}

    def logits(self, packed: Packed) -> Tensor:
        """(tokens, vocab)."""
        return ops.linear(self.hidden(packed), self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """(vocab, hidden), of the dtype it computes in."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return local(weight).to(self.dtype)

    @torch.no_grad()
    def initialise(
        self, *, seed: int, std: float = 0.02, embedding_std: float | None = None, last_norm: float = 1.0
    ) -> None:
        """Random weights, each a function of the seed and its name alone: the same in every process, in any order.

        Matrices are normal with `std`; those whose product is added to the residual get std / sqrt(2 layers), so that the sum of
        all layers starts no larger than one of them (GPT-2). Norms are one, biases zero. Of a parameter that ranks share out, each
        makes the whole and keeps its part.
        """
        into_residual = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(last_norm if name == "model.norm.weight" else 1.0)
            else:
                scale = into_residual if name.endswith(("o_proj.weight", "down_proj.weight")) else std
                if name == "model.embed_tokens.weight" and embedding_std is not None:
                    scale = embedding_std
                assign(parameter, torch.randn(parameter.shape, generator=random_generator(seed, name)) * scale)

    @torch.no_grad()
    def fill(self, decoder: Decoder) -> None:
        """Takes the weights of a decoder of the same config."""
        for name, slot in huggingface_slots(self.config).items():
            assign(self.get_parameter(name), slot.of(decoder))

    @torch.no_grad()
    def as_decoder(self) -> Decoder:
        """The decoder that generates, with a copy of these weights in float32."""
        decoder = Decoder(self.config, device=self.model.norm.weight.device)
        for name, slot in huggingface_slots(self.config).items():
            slot.fill(decoder, self.get_parameter(name))
        return decoder


def random_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers for what has this name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _policy(context: Any, op: Callable[..., Any], *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
