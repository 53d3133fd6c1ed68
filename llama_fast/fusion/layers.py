"""The layers that run fused kernels, from the norm up to the decoder layer. Each stands in for a layer of one structure.

Two rules hold for all of them. They hold no state: weights, eps and submodules are read when they are used, so that moved,
frozen, retyped or replaced parameters and PEFT's layers work. And a module on which hooks are set is called as ever: what it
computes moves into another's kernel only while nobody watches it.

A small model takes its time for a token between the operators, so with few rows a decoder layer is three of them, of five launches:

    q, k, v = rope(norm(x) @ q, k, v)                                             norm_heads
    attended                                                                      attention_decode, behind the cache
    h = x + attended @ o,  h + (silu(norm(h) @ gate) * (norm(h) @ up)) @ down     layer_tail
"""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels import cpu
from ..kernels.launch import INTERPRETED
from ..kernels.layer_tail import Linear, layer_tail
from ..kernels.matmul import FEW_ROWS, is_onednns
from ..kernels.norm_heads import norm_heads
from ..kernels.torch_compat import GLOBAL_MODULE_HOOKS
from .attention import eager_attention
from .neighbours import (
    ALL_ATTENTION_FUNCTIONS,
    attention_of,
    update_cache,
    with_any_cache_name,
)
from .swap import Fused, is_watched


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes x @ weight.T + bias and nothing else, so that a kernel may do it in its place."""
    return type(module) is nn.Linear and has_plain_weight(module) and not is_watched(module)


def has_plain_weight(module: nn.Module) -> bool:
    """Whether its weight is neither quantised nor sharded."""
    return type(module._parameters.get("weight")) in (nn.Parameter, Tensor)


def part(module: nn.Module, name: str) -> Any:
    """A submodule. (From the dictionary: through `nn.Module.__getattr__` it takes 0.4 us, and a decoder layer has thirty.)"""
    return module._modules[name]


def linear_of(module: Any) -> Linear:
    """The weight and bias of a projection."""
    return module._parameters["weight"], module._parameters["bias"]


def matrices(module: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> list[Linear] | None:
    """The weights and biases of projections that one kernel may do: plain ones of a dtype, with a bias all or none; else None."""
    found: list[tuple[Any, Any]] = []
    for name in names:
        linear = part(module, name)
        if not is_plain_linear(linear):
            return None
        weight, bias = linear_of(linear)
        if weight.dtype != dtype or (bias is None) != (found[0][1] is None if found else bias is None):
            return None
        found.append((weight, bias))
    return found


def has_norm_kernels(x: Tensor) -> bool:
    """Whether there are kernels that norm and project `x` (..., hidden), and they are the faster ones: for few rows and no gradient;
    on a CPU, where they run natively. Autocast chooses a dtype for each op, and global hooks want to see each module."""
    if torch.is_grad_enabled() or x.numel() > FEW_ROWS * x.shape[-1]:
        return False
    if torch.is_autocast_enabled(x.device.type) or any(GLOBAL_MODULE_HOOKS):
        return False
    if torch.compiler.is_compiling() or INTERPRETED or x.device.type != "cpu":
        return True
    return cpu.chosen() != "pytorch" and _cpu_multiplies(x.dtype)


_cpu_multiplies = functools.cache(cpu.multiplies)  # which asks the environment: 2 us


def project(linear: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """`linear(x)`, or `linear(x) + residual` in one kernel. A kernel also does what PyTorch multiplies slower on a CPU."""
    if residual is not None or (is_plain_linear(linear) and _multiplies_faster(x, linear.weight)):
        weight, bias = linear_of(linear)
        return ops.linear(x, weight, bias, residual=residual)
    return linear(x)


def project_to_heads(linear: Any, x: Tensor) -> Any:
    """`linear(x)`. In float32 by PyTorch itself: oneDNN's products of K = 576 have twice the error of MKL's, and scores make it large. Layer 1 of
    SmolLM2 was off by 2.0e-6, the original by 0.9e-6, so that no layer got our attention."""
    return linear(x) if x.dtype == torch.float32 else project(linear, x)


def _multiplies_faster(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or INTERPRETED or x.device.type != "cpu" or x.numel() <= FEW_ROWS * x.shape[-1]:
        return False
    return not any(GLOBAL_MODULE_HOOKS) and (cpu.has_large_products(x.dtype) or is_onednns(x, weight))


class FusedHead(Fused):
    """The projection to logits on a CPU. PyTorch copies a bfloat16 weight for the last token of a prompt, which the model cuts out of all:
    115 ms for 49,152 x 576, and 2.3 here; a single token takes it 9.8 ms, and 10.3 in float32, here 4.6 (one thread of an AMD EPYC)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not has_plain_weight(self):
            return super().forward(x)
        few = has_norm_kernels(x)
        return ops.linear(x, *linear_of(self)) if few or _multiplies_faster(x, self.weight) else super().forward(x)


class FusedRMSNorm(Fused):
    """LlamaRMSNorm and its like, with the weight as it is or, in Gemma, as a distance from one."""

    eps_name: ClassVar[str]
    offset: ClassVar[float]
    dtype_of: ClassVar[str]  # whose the result has: in Gemma "x"'s, in T5 "weight"'s, in Llama the wider of "both"

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Any:
        """The normed `x`; with `residual` the pair (normed, x + residual)."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.is_inference():
            # `inputs_embeds` made in inference mode: LlamaRMSNorm does not keep its input for autograd, and we do
            x = x.clone()
        weight = self.weight
        out: Any = ops.rms_norm(x, weight, self.eps_of(x), residual=residual, offset=self.offset)
        if self.dtype_of == "both":
            return out
        dtype = x.dtype if self.dtype_of == "x" else weight.dtype
        return out.to(dtype) if residual is None else (out[0].to(dtype), out[1])

    def eps_of(self, x: Tensor) -> float:
        eps: float | None = getattr(self, self.eps_name)
        return torch.finfo(x.dtype).eps if eps is None else eps  # nn.RMSNorm's default

    def moves_into(self, x: Tensor) -> bool:
        """Whether the kernels that norm and project norm `x` as this does."""
        weight: Tensor | None = self.weight
        return self.offset == 0.0 and weight is not None and weight.dtype == x.dtype and not is_watched(self)


class FusedLayerNorm(Fused):
    """nn.LayerNorm over the last dimension."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Any:
        """The normed `x`; with `residual` the pair (normed, x + residual)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


def identity(activation: Any) -> tuple[Any, ...]:
    """What tells an activation from another: its type and, of a gelu, its form; of a function, itself. Copies are the same."""
    if isinstance(activation, nn.Module):
        return type(activation), getattr(activation, "approximate", None)
    return (activation,)


class FusedMLP(Fused):
    """down(act(gate(x)) * up(x)), with gate and up as two projections or as the halves of one.

    If the activation was replaced since, the MLP's own forward runs.
    """

    activation: ClassVar[Any]  # "silu", or the form of the gelu: "tanh", "none"
    activation_name: ClassVar[str]  # of the attribute
    activation_is: ClassVar[tuple[Any, ...]]  # what was there, as `identity` tells it
    is_one_projection: ClassVar[bool]

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """The MLP of `x`, plus `residual`."""
        if identity(getattr(self, self.activation_name)) != self.activation_is:
            out: Tensor = super().forward(x)
            return out if residual is None else residual + out
        both = (
            project(self.gate_up_proj, x).chunk(2, dim=-1)
            if self.is_one_projection
            else (project(self.gate_proj, x), project(self.up_proj, x))
        )
        hidden = ops.swiglu(*both) if self.activation == "silu" else ops.geglu(*both, approximate=self.activation)
        return project(self.down_proj, hidden, residual)

    def adds_residual(self) -> bool:
        return not is_watched(self) and is_plain_linear(part(self, "down_proj"))

    def gate_up(self, dtype: torch.dtype) -> list[Linear] | None:
        """The projections to gate and up, perhaps in one, where a kernel may do all of them and SwiGLU; else None."""
        names = ("gate_up_proj",) if self.is_one_projection else ("gate_proj", "up_proj")
        if self.activation != "silu" or identity(getattr(self, self.activation_name)) != self.activation_is:
            return None
        return matrices(self, names, dtype)


class FusedAttention(Fused):
    """The projections of attention around a fused RoPE; what attends is the attention that the model's config names."""

    is_one_projection: ClassVar[bool]
    norms_heads: ClassVar[bool]
    softcaps: ClassVar[bool]
    window_of: ClassVar[str]  # who knows the sliding window: "module", "config", "" if there is none

    @with_any_cache_name
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, attention weights if they were asked for), the output plus `residual`."""
        query, key, value = self._heads(hidden_states)
        query, key = ops.rope(query, key, *position_embeddings)
        out, weights = self._attend(query, key, value, attention_mask, cache, kwargs)
        return project(self.o_proj, out, residual), weights

    @with_any_cache_name
    def of_few_rows(
        self,
        x: Tensor,
        norm: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The attention of norm(x), not projected yet: (batch, seq, heads * head_dim). None where no kernel does norm and projections."""
        names = ("qkv_proj",) if self.is_one_projection else ("q_proj", "k_proj", "v_proj")
        if self.norms_heads or (linears := matrices(self, names, x.dtype)) is None:
            return None
        weights, biases = zip(*linears, strict=True)
        heads, kv_heads = self._numbers_of_heads()
        query, key, value = norm_heads(
            x, norm.weight, weights, biases, *position_embeddings,
            eps=norm.eps_of(x), heads=heads, kv_heads=kv_heads,
        )  # fmt: skip
        return self._attend(query, key, value, attention_mask, cache, kwargs)[0]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, seq, heads * head_dim), and attention weights, of (batch, heads, seq, head_dim), whose keys and values are kept."""
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)
        if self.softcaps:
            kwargs["softcap"] = self.attn_logit_softcapping
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config), eager_attention)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self._window(),
            **kwargs,
        )
        return out.flatten(2), weights

    def _window(self) -> int | None:
        if not self.window_of:
            return None
        return self.sliding_window if self.window_of == "module" else self.config.sliding_window

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, heads, seq, head_dim)."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        if self.is_one_projection:
            heads, kv_heads = self._numbers_of_heads()
            widths = [count * self.head_dim for count in (heads, kv_heads, kv_heads)]
            query, key, value = project_to_heads(self.qkv_proj, x).split(widths, dim=-1)
        else:
            query, key, value = (project_to_heads(each, x) for each in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = query.view(shape), key.view(shape), value.view(shape)
        if self.norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _numbers_of_heads(self) -> tuple[int, int]:
        if self.is_one_projection:
            return self.config.num_attention_heads, self.config.num_key_value_heads
        q_proj, k_proj = part(self, "q_proj"), part(self, "k_proj")
        return q_proj.out_features // self.head_dim, k_proj.out_features // self.head_dim

    def adds_residual(self) -> bool:
        return not is_watched(self) and is_plain_linear(part(self, "o_proj"))


class FusedDecoderLayer(Fused):
    """x + attention(norm(x)), then h + mlp(norm(h)): both sums in the epilogue of the projection before them.

    Where that projection is no plain nn.Linear when it is called (under PEFT), the first sum goes into the norm after it. If dropout
    was switched on since, the layer's own forward runs.
    """

    dropouts: ClassVar[tuple[str, ...]]  # modules that drop out of the sums, which they must not do

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        if self.training and any(getattr(self, name).p > 0.0 for name in self.dropouts):
            return super().forward(hidden_states, **kwargs)
        if has_norm_kernels(hidden_states) and (out := self._of_few_rows(hidden_states, kwargs)) is not None:
            return out
        normed = self.input_layernorm(hidden_states)
        if _adds_residual(self.self_attn):
            hidden_states, _ = self.self_attn(normed, residual=hidden_states, **kwargs)
            normed = self.post_attention_layernorm(hidden_states)
        else:
            out, _ = self.self_attn(hidden_states=normed, **kwargs)
            normed, hidden_states = _add_and_norm(self.post_attention_layernorm, out, hidden_states)
        return self._add_mlp(normed, hidden_states)

    def _of_few_rows(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The layer in as few ops as its parts allow; None where these are the separate ones."""
        attention, norm = part(self, "self_attn"), part(self, "input_layernorm")
        mlp, next_norm = part(self, "mlp"), part(self, "post_attention_layernorm")
        if not _adds_residual(attention):
            return None
        attended = attention.of_few_rows(x, norm, **kwargs) if _moves(norm, x) else None
        gate_up = mlp.gate_up(x.dtype) if _adds_residual(mlp) and _moves(next_norm, x) else None
        if attended is None and gate_up is None:
            return None
        output = part(attention, "o_proj")
        if attended is not None and gate_up is not None:
            down, eps = linear_of(part(mlp, "down_proj")), next_norm.eps_of(x)
            return layer_tail(attended, x, linear_of(output), next_norm.weight, gate_up, down, eps=eps)
        if attended is not None:
            x = project(output, attended, x)
        else:
            x, _ = attention(norm(x), residual=x, **kwargs)
        if gate_up is None:
            return self._add_mlp(next_norm(x), x)
        (gate, gate_bias), (up, up_bias) = (*gate_up, (None, None))[:2]
        inner = ops.norm_swiglu(
            x, next_norm.weight, gate, gate_bias, eps=next_norm.eps_of(x), up_weight=up, up_bias=up_bias
        )
        return project(mlp.down_proj, inner, x)

    def _add_mlp(self, normed: Tensor, residual: Tensor) -> Tensor:
        return self.mlp(normed, residual=residual) if _adds_residual(self.mlp) else residual + self.mlp(normed)


def _adds_residual(module: nn.Module) -> bool:
    return isinstance(module, FusedMLP | FusedAttention) and module.adds_residual()


def _moves(norm: nn.Module, x: Tensor) -> bool:
    return isinstance(norm, FusedRMSNorm) and norm.moves_into(x)


def _add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual). Under autocast the two differ in dtype, and PyTorch adds them."""
    if isinstance(norm, FusedRMSNorm | FusedLayerNorm) and not is_watched(norm) and x.dtype == residual.dtype:
        return norm(x, residual=residual)
    total = residual + x
    return norm(total), total
