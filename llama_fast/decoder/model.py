"""The decoder: what a LLaMA computes, over one flat row of tokens.

    x = embedding[ids]
    for each layer:   x = x + output(attention(rope(norm(x) @ qkv)))
                      x = x + down(silu(gate(norm(x))) * up(norm(x)))
    logits = norm(x) @ head

Tokens of all sequences lie side by side, so a step of generation may mix decoding rows with chunks of prompts. The decoder
does not know which token belongs to which sequence: it hands keys and values to a `Context` and asks it for the attention.
Families differ by data (`DecoderConfig`), not by code. Weights that read the same input are stored as one matrix:
`qkv` has the rows of q, k, v, and `gate_up` those of gate, up.

Source: Touvron et al., LLaMA, 2023 (arXiv:2302.13971).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels import cpu
from ..kernels.embedding import embedding
from ..kernels.launch import INTERPRETED, dependent_launch
from ..kernels.matmul import FEW_ROWS
from ..kernels.norm_qkv_rope import norm_qkv_rope
from ..kernels.norm_swiglu import norm_swiglu
from ..kernels.rope_append import rope_append
from .config import DecoderConfig
from .rotary import RotaryTable


class Context(Protocol):
    """Where the tokens of a step stand in their sequences, and the keys and values before them."""

    positions: Tensor  # (tokens,) int64: of each token in its own sequence
    lengths: Tensor  # (tokens,) int64: of its sequence, as `RotaryTable.rows` counts it
    slots: Tensor | None  # (tokens,) int64: where its keys and values go in `cache`; None where there is no paged cache

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (blocks, kv_heads, block_size, head_dim)."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps the step's keys and values, (kv_heads, tokens, head_dim)."""

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        """(tokens, heads * head_dim) from the queries (heads, tokens, head_dim), after `append`."""


@dataclass(frozen=True, kw_only=True)
class Fusions:
    """What one launch does where the Triton kernels run, and how launches follow; each can be switched off, to measure what it gains.

    The first two are kernels for up to 16 tokens: a decoding step, or a short chunk of a prompt.
    """

    norm_qkv_rope: bool = True  # norm, q/k/v projection, rotation, and keys and values into the cache
    norm_swiglu: bool = True  # norm, gate and up projections, SwiGLU
    residual: bool = True  # the residual add in the epilogue of the projection before it
    dependent_launch: bool = True  # a kernel starts while the one before it ends, where the GPU can (sm_90 and up)

    @classmethod
    def where(cls, device: torch.device, dtype: torch.dtype) -> "Fusions":
        """All where Triton runs. On PyTorch's ops the fused ones are the plain ones one after the other."""
        triton = device.type != "cpu" or INTERPRETED or runs_natively(dtype)
        return cls(norm_qkv_rope=triton, norm_swiglu=triton)


def runs_natively(dtype: torch.dtype) -> bool:
    """Whether a decoder of this dtype runs on Triton kernels on this CPU: they are wanted here, and multiply it."""
    return not INTERPRETED and cpu.chosen() != "pytorch" and cpu.multiplies(dtype)


class Linear(nn.Module):
    """A linear layer whose weights a loader fills."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **where))
        self.bias = nn.Parameter(torch.empty(out_features, **where)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _linear(x, self.weight, self.bias, residual)

    def pack(self) -> None:
        """Packs the weight for a CPU: see `Decoder.pack`."""
        self.weight = nn.Parameter(_packed(self.weight), requires_grad=False)


def _packed(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own layout, where the CPU has one for its dtype; `to_dense` gives the same bits back.

    The matrices of a 125M model took 23 ms plain and 10 packed for one row of float32, 42 and 9 for 8 rows, 638 and 270 for 512 rows;
    11 and 4 for one row of bfloat16 (two cores of an AMD EPYC with AVX-512; PyTorch 2.13).
    """
    weight = weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight) if _can_pack(weight.dtype) else weight


_PACKED_OPS = ("_reorder_linear_weight", "_linear_pointwise")  # private: without them weights stay plain


def _can_pack(dtype: torch.dtype) -> bool:
    if cpu.has_large_products(dtype):  # then our kernels multiply many rows faster, and read weights as they are
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in _PACKED_OPS):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`ops.linear`, also of a packed weight."""
    if not weight.is_mkldnn:
        return ops.linear(x, weight, bias, residual=residual)
    y: Tensor
    if residual is None:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    return y


class Embedding(nn.Module):
    """A row of weights for each token."""

    def __init__(self, vocab_size: int, hidden_size: int, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, **where))

    def forward(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self.weight)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last dimension."""

    def __init__(self, size: int, eps: float, *, layer_norm: bool = False, **where: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, **where))
        self.bias = nn.Parameter(torch.empty(size, **where)) if layer_norm else None

    def forward(self, x: Tensor) -> Tensor:
        normed = (
            ops.rms_norm(x, self.weight, self.eps)
            if self.bias is None
            else ops.layer_norm(x, self.weight, self.bias, self.eps)
        )
        assert isinstance(normed, Tensor)  # a pair only with a residual
        return normed


class Attention(nn.Module):
    """Queries, keys and values from one matrix; heads rotated by position; grouped-query attention by the context."""

    def __init__(self, config: DecoderConfig, **where: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias, **where)
        self.output = Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias, **where
        )  # fmt: skip
        self.query_norm = Norm(config.head_dim, config.norm_eps, **where) if config.head_norm else None
        self.key_norm = Norm(config.head_dim, config.norm_eps, **where) if config.head_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (heads, tokens, head_dim) and k, v (kv_heads, tokens, head_dim) of normalised x (tokens, hidden)."""
        heads = self.qkv(x).view(len(x), -1, self.head_dim).transpose(0, 1)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = ops.rope(q[None], k[None], cos[None], sin[None])
        return q[0], k[0], v

    def append(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], slots: Tensor) -> Tensor:
        """q (heads, tokens, head_dim) of normalised x, after its keys and values went to their slots of the cache."""
        norms: Any = {}
        if self.query_norm is not None and self.key_norm is not None:
            norms = dict(q_norm=self.query_norm.weight, k_norm=self.key_norm.weight, eps=self.query_norm.eps)
        return rope_append(self.qkv(x), cos, sin, *cache, slots, heads=self.heads, **norms).transpose(0, 1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without `down`, whose sum with the residual the layer asks for."""

    def __init__(self, config: DecoderConfig, **where: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = Linear(hidden, 2 * inner, bias=config.mlp_bias, **where)
        self.down = Linear(inner, hidden, bias=config.mlp_bias, **where)

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(*self.gate_up(x).chunk(2, dim=-1))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, index: int, **where: Any) -> None:
        super().__init__()
        self.index, self.window = index, config.windows[index]
        norm = (config.hidden_size, config.norm_eps)
        self.attention_norm = Norm(*norm, layer_norm=config.layer_norm, **where)
        self.attention = Attention(config, **where)
        self.mlp_norm = Norm(*norm, layer_norm=config.layer_norm, **where)
        self.mlp = MLP(config, **where)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: Context, fusions: Fusions) -> Tensor:
        few = context.slots is not None and len(x) <= FEW_ROWS
        plain = self.attention.query_norm is None and self.attention_norm.bias is None
        if few and fusions.norm_qkv_rope and plain and self.attention.head_dim % 2 == 0:
            q = self._append_fused(x, cos, sin, context)
        elif context.slots is not None and context.cache(self.index)[0].dtype == x.dtype:
            q = self.attention.append(self.attention_norm(x), cos, sin, context.cache(self.index), context.slots)
        else:
            q, k, v = self.attention(self.attention_norm(x), cos, sin)
            context.append(self.index, k, v)
        x = self._add(x, self.attention.output, context.attend(self.index, q, self.window), fusions)
        if few and fusions.norm_swiglu and self.mlp_norm.bias is None:
            gate_up = self.mlp.gate_up
            inner = norm_swiglu(x, self.mlp_norm.weight, gate_up.weight, gate_up.bias, eps=self.mlp_norm.eps)
        else:
            inner = self.mlp(self.mlp_norm(x))
        return self._add(x, self.mlp.down, inner, fusions)

    def _append_fused(self, x: Tensor, cos: Tensor, sin: Tensor, context: Context) -> Tensor:
        norm, qkv = self.attention_norm, self.attention.qkv
        assert context.slots is not None
        q = norm_qkv_rope(
            x, norm.weight, qkv.weight, qkv.bias, cos, sin, *context.cache(self.index), context.slots,
            eps=norm.eps, heads=self.attention.heads,
        )  # fmt: skip
        return q.squeeze(2).transpose(0, 1)

    @staticmethod
    def _add(x: Tensor, projection: Linear, inner: Tensor, fusions: Fusions) -> Tensor:
        y: Tensor = projection(inner, residual=x) if fusions.residual else x + projection(inner)
        return y


class Decoder(nn.Module):
    """A LLaMA-like decoder with uninitialised weights: see `checkpoint.load`."""

    def __init__(
        self, config: DecoderConfig, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32,
        fusions: Fusions | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        where: Any = {"device": device, "dtype": dtype}
        self.config = config
        device = torch.get_default_device() if device is None else device
        self.fusions = Fusions.where(device, dtype) if fusions is None else fusions
        self.embedding = Embedding(config.vocab_size, config.hidden_size, **where)
        self.layers = nn.ModuleList(Layer(config, i, **where) for i in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.norm_eps, layer_norm=config.layer_norm, **where)
        self.head = None if config.tied_embeddings else Linear(config.hidden_size, config.vocab_size, **where)
        self._packed_embedding: Tensor | None = None  # as head, where it is both
        self.rotary = RotaryTable(config, device)

    def forward(self, token_ids: Tensor, context: Context) -> Tensor:
        """The hidden states before the last norm, (tokens, hidden), of `token_ids` (tokens,)."""
        x: Tensor = self.embedding(token_ids)
        cos, sin = self.rotary.rows(context.positions, context.lengths)
        with dependent_launch(self.fusions.dependent_launch):
            for layer in self.layers:
                x = layer(x, cos, sin, context, self.fusions)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocab) for the rows of `forward`'s hidden states whose next token is asked for."""
        with dependent_launch(self.fusions.dependent_launch):
            if self.head is not None:
                logits: Tensor = self.head(self.norm(hidden))
                return logits
            weight = self.embedding.weight if self._packed_embedding is None else self._packed_embedding
            return _linear(self.norm(hidden), weight)

    @property
    def is_packed(self) -> bool:
        """Whether some weights are in a CPU's own layout."""
        return any(parameter.is_mkldnn for parameter in self.parameters())

    def pack(self) -> None:
        """Packs the weights for a CPU. The fused kernels of a decoding step want them plain: switch these off."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self.head is None:
            self._packed_embedding = _packed(self.embedding.weight)
