"""The names of transformers, PEFT and accelerate that fused layers rely on, each with all its spellings, where releases or
families spell it differently: such names stand here alone.

Neighbours rename at every release, and `fuse` leaves alone what it does not find: a missed name costs speed, not an error. So whoever
adds a spelling adds it here, and `tests/fusion` runs against the oldest and the newest transformers that are supported.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "BaseModelOutputWithPast",
    "DynamicCache",
    "ForCausalLMLoss",
    "GradientCheckpointingLayer",
    "PreTrainedModel",
    "StaticCache",
    "and_masks",
    "can_return_tuple",
    "causal_mask_function",
    "is_tracing",
    "sdpa_mask",
    "sliding_window_overlay",
]

# --- the KV cache -----------------------------------------------------------------------------------------------------

CACHE_NAMES = ("cache", "past_key_values")
"""The argument of attention, decoder layers and models that holds the KV cache, and the field of their outputs: `past_key_values` up to
5.23, `cache` from 5.24 on, where the old name is an alias until 5.40. Models that bring their own code may have either."""

CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(CausalLMOutputWithPast).parameters)
"""How the installed transformers spells it."""


def cache_name(forward: Callable[..., Any]) -> str | None:
    """Which of `CACHE_NAMES` an unbound or bound `forward` takes."""
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None)


def with_any_cache_name(forward: Callable[..., Any]) -> Any:
    """Lets a `forward` with an argument `cache` be called with any of `CACHE_NAMES`; its signature shows transformers' own."""
    own = inspect.signature(forward)

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        for name in CACHE_NAMES[1:]:
            if name in kwargs:
                kwargs["cache"] = kwargs.pop(name)
        return forward(*args, **kwargs)

    shown = [p.replace(name=CACHE_NAME) if p.name == "cache" else p for p in own.parameters.values()]
    renamed.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
    return renamed


def update_cache(
    cache: Any, key: Tensor, value: Tensor, layer_idx: int, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What attention does with a cache: from 5.24 on it hands over its other `arguments`, which paged caches read and change."""
    more = dict(kwargs=arguments) if CACHE_NAME == "cache" else {}
    updated: tuple[Tensor, Tensor] = cache.update(key, value, layer_idx, **more)
    return updated


def causal_lm_output(loss: Tensor, outputs: Any) -> CausalLMOutputWithPast:
    """A language model's output without logits, around its decoder's `outputs`."""
    cache = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
    return CausalLMOutputWithPast(
        loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **cache
    )


# --- settings ---------------------------------------------------------------------------------------------------------


def attention_of(config: Any) -> str:
    """The name of the attention that a model's config asks for."""
    name: str = config._attn_implementation
    return name


def set_attention(config: Any, name: str) -> None:
    config._attn_implementation = name


def set_experts(config: Any, name: str) -> None:
    config._experts_implementation = name


# --- what layers are made of ------------------------------------------------------------------------------------------

NORM_EPS = ("variance_epsilon", "eps")
ACTIVATIONS = ("act_fn", "activation_fn")
ACTIVATION_SETTINGS = {"training", "inplace", "approximate", "act"}
MLP_PROJECTIONS = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
ATTENTION_PROJECTIONS = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
HEAD_NORMS = {"q_norm", "k_norm"}
ATTENTION_SETTINGS = ("head_dim", "scaling", "attention_dropout", "config")
DECODER_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}

OTHER_ATTENTION = ("s_aux", "position_bias", "cache")
"""Arguments of an attention function that ask for another attention: sinks, position biases, paged caches (up to 5.23)."""


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate runs the module, on another device or from where it is offloaded to."""
    return hasattr(module, "_hf_hook")


def base_layer(projection: Any) -> Any:
    """The projection that PEFT's adapter is around, or the projection itself."""
    return getattr(projection, "base_layer", projection)
