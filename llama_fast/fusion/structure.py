"""Which layer is of which structure: by its submodules, parameters and settings, never by its class or module name.

Each function gives, for a module, the fused layer that may stand in for it, the reason why none may, or None if the module
is nothing of that sort. A structure says what a layer has, not what it computes: that is for `verify` to find out.
"""

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_lm import FusedCausalLM
from .layers import FusedAttention, FusedDecoderLayer, FusedHead, FusedLayerNorm, FusedMLP, FusedRMSNorm, identity
from .neighbours import (
    ACTIVATION_SETTINGS,
    ACTIVATIONS,
    ATTENTION_PROJECTIONS,
    ATTENTION_SETTINGS,
    DECODER_LAYER,
    HEAD_NORMS,
    MLP_PROJECTIONS,
    NORM_EPS,
    ForCausalLMLoss,
    base_layer,
    cache_name,
    is_dispatched,
)
from .swap import Fused, plain_copy

_ACTIVATIONS = dict[str, Any](silu=F.silu, tanh=functools.partial(F.gelu, approximate="tanh"), none=F.gelu)
"""As `FusedMLP.activation` names them."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Swap:
    """A fused layer for a module, and the options of its class."""

    kind: type[Fused]
    options: dict[str, Any] = field(default_factory=dict)


CALL_ERRORS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)
"""What calling a layer raises that is not the layer it was taken for."""

Found = Swap | str | None
"""What a function here finds: a swap, the reason against one, or nothing of its sort."""


def norm(module: Any) -> Found:
    """A norm over the last dimension: nn.LayerNorm, nn.RMSNorm, or one weight vector and an eps."""
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return f"it norms over {len(module.normalized_shape)} dimensions, not one"
        if type(module) is nn.LayerNorm:
            return Swap(FusedLayerNorm)
        return Swap(FusedRMSNorm, dict(eps_name="eps", offset=0.0, dtype_of="both"))
    eps_name = next((name for name in NORM_EPS if isinstance(getattr(module, name, None), float)), None)
    parameters = dict(module.named_parameters())
    if eps_name is None or set(parameters) != {"weight"} or any(True for _ in module.children()):
        return None
    if parameters["weight"].ndim != 1 or isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return None
    return _known_rms_norm(module, eps_name)


def _known_rms_norm(module: Any, eps_name: str) -> Swap | str:
    """Tries a few rows: does the norm multiply by its weight or by 1 + weight, and which dtype does it return?"""
    if more := _more_than_one_tensor(module):
        return more
    stand_in: Any = plain_copy(module).to_empty(device="cpu").float()
    size = stand_in.weight.shape
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(size, generator=generator)
    stand_in.weight = nn.Parameter(given, requires_grad=False)
    x = torch.randn(4, *size, generator=generator)
    try:
        out, low_x = stand_in(x), stand_in(x.bfloat16())
        low_weight = stand_in.bfloat16()(x)
    except CALL_ERRORS as error:
        return f"it cannot be called with one tensor: {first_line(error)}"
    dtypes = {(False, False): "both", (True, False): "x", (False, True): "weight"}
    dtype_of = dtypes.get((low_x.dtype == torch.bfloat16, low_weight.dtype == torch.bfloat16))
    if dtype_of is None:
        return "its output has neither the dtype of its input, nor of its weight, nor the wider one"
    normed = F.rms_norm(x, size, None, getattr(module, eps_name))
    for offset in (0.0, 1.0):
        if torch.allclose(out, normed * (given + offset), rtol=1e-4, atol=1e-5):
            return Swap(FusedRMSNorm, dict(eps_name=eps_name, offset=offset, dtype_of=dtype_of))
    return "it is no RMSNorm: neither its weight nor 1 + weight gives its output"


def _more_than_one_tensor(module: nn.Module) -> str | None:
    """Names what a layer is given beside its input: gates, indices."""
    taken = list(inspect.signature(type(module).forward).parameters)[1:]
    return f"its forward takes more than one tensor: {', '.join(taken)}" if len(taken) != 1 else None


def mlp(module: nn.Module) -> Found:
    """Gate, up and down projections, the first two perhaps in one, and an activation."""
    projections = set(dict(module.named_children())) - set(ACTIVATIONS)
    if projections not in MLP_PROJECTIONS:
        return None
    name = next((name for name in ACTIVATIONS if hasattr(module, name)), "")
    function = getattr(module, name, None)
    activation = _activation(function)
    if activation is None:
        return f"its activation is neither SiLU nor GELU: {type(function).__name__}"
    if own := _own_settings(function):
        return f"its activation has settings of its own: {own}"
    options = dict(
        activation=activation,
        activation_name=name,
        activation_is=identity(function),
        is_one_projection="gate_up_proj" in projections,
    )
    return _strange_projection(module, projections) or _other_mlp(module, activation) or Swap(FusedMLP, options)


def _activation(function: Any) -> str | None:
    """The activation's name, from its values: the two forms of the gelu differ by up to 5e-4."""
    x = torch.linspace(-4.0, 4.0, 65)
    try:
        out = (plain_copy(function) if isinstance(function, nn.Module) else function)(x)
    except CALL_ERRORS:
        return None
    return next((name for name, f in _ACTIVATIONS.items() if torch.allclose(out, f(x), rtol=0.0, atol=1e-5)), None)


def _own_settings(function: Any) -> str:
    """What may change an activation without making it another, beside what PyTorch's and transformers' own have."""
    if not isinstance(function, nn.Module):
        return ""
    attributes = {name for name in vars(function) if not name.startswith("_")}
    return ", ".join(sorted((attributes - ACTIVATION_SETTINGS) | set(function.state_dict())))


class _Gives(nn.Module):
    """In place of a projection: gives what it was made with, or what it is given."""

    def __init__(self, out: Tensor | None = None) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return x if self.out is None else self.out


def _other_mlp(module: Any, activation: str) -> str | None:
    """Why it is no down(act(gate) * up), tried on a stand-in without projections: some clamp large values, which random
    input does not reach, and some drop out in training."""
    if more := _more_than_one_tensor(module):
        return more
    width = base_layer(module.down_proj).weight.shape[1]
    gate, up = 100.0 * torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0))
    stand_in: Any = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__, training=True, _modules={})
    for name, child in module.named_children():
        stand_in._modules[name] = plain_copy(child) if name in ACTIVATIONS else _Gives()
    both = dict(gate_proj=gate, up_proj=up, gate_up_proj=torch.cat([gate, up], dim=-1))
    for name in stand_in._modules.keys() & both.keys():
        stand_in._modules[name].out = both[name]
    try:
        with torch.random.fork_rng(devices=[]):
            out = type(module).forward(stand_in, gate)
    except CALL_ERRORS as error:
        return f"it cannot be tried: {first_line(error)}"
    is_known = out.shape == gate.shape and torch.allclose(
        out, _ACTIVATIONS[activation](gate) * up, rtol=1e-4, atol=1e-3
    )
    return None if is_known else "it is not down(act(gate) * up): perhaps it clamps or drops out"


def attention(module: Any) -> Found:
    """Projections to queries, keys and values, perhaps in one, norms of the heads perhaps, and an output projection."""
    children = set(dict(module.named_children()))
    if not hasattr(module, "layer_idx") or not (hasattr(module, "scaling") or hasattr(module, "is_causal")):
        return None
    separate, one = ATTENTION_PROJECTIONS
    if children not in (separate, separate | HEAD_NORMS, one):
        return f"it has {', '.join(sorted(children))}, not q_proj, k_proj, v_proj (or qkv_proj) and o_proj"
    missing = [name for name in ATTENTION_SETTINGS if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    forward = type(module).forward
    taken = {*inspect.signature(forward).parameters} | ({"cache"} if cache_name(forward) else set())
    if absent := [name for name in ("position_embeddings", "cache", "attention_mask") if name not in taken]:
        return f"its forward takes no {', '.join(absent)}"
    if own := [name for name, _ in module.named_parameters(recurse=False)]:
        return f"it has parameters of its own: {', '.join(own)}"
    if dropout := _dropout(module):
        return dropout
    if "q_norm" in children and getattr(module.q_norm, "weight", torch.empty(0)).shape != (module.head_dim,):
        return "it norms queries over all heads, not each head"
    holders = (("module", module), ("config", module.config))
    options = dict(
        is_one_projection=children == one,
        norms_heads="q_norm" in children,
        softcaps=hasattr(module, "attn_logit_softcapping"),
        window_of=next((name for name, holder in holders if hasattr(holder, "sliding_window")), ""),
    )
    return _strange_projection(module, children - HEAD_NORMS) or Swap(FusedAttention, options)


def decoder_layer(module: Any) -> Swap | str:
    """Attention and MLP, each after a norm and inside a residual sum. Its submodules must have been swapped before."""
    children: dict[str, Any] = dict(module.named_children())
    if missing := sorted(DECODER_LAYER - set(children)):
        return f"it has no {', '.join(missing)}"
    rest = set(children) - DECODER_LAYER
    if more := sorted(name for name in rest if not isinstance(children[name], nn.Dropout)):
        return f"more than a projection stands before its sums: {', '.join(more)}"
    if any(children[name].p > 0.0 for name in rest):
        return f"it drops out of its sums: {', '.join(sorted(rest))}"
    if dropout := _dropout(module):
        return dropout
    if not isinstance(children["self_attn"], FusedAttention) and not isinstance(children["mlp"], FusedMLP):
        return "neither its attention nor its MLP was swapped"
    return Swap(FusedDecoderLayer, dict(dropouts=tuple(sorted(rest))))


_SMALL_HEAD = 2**21  # elements: 1136 x 128 of float32 takes PyTorch 20 us a token, and us 30


def head(module: Any) -> Found:
    """The projection to logits, on a CPU. (A GPU's is cuBLAS's.)"""
    if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu" or module.weight.numel() < _SMALL_HEAD:
        return None
    return Swap(FusedHead) if type(module) is nn.Linear else f"it is {_class_name(module)}, not nn.Linear"


def causal_lm(module: Any) -> Found:
    """A model with a head of logits and the loss of the next token."""
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is None or not hasattr(module, "loss_function"):
        return None
    if _arguments(type(module).forward) != _arguments(FusedCausalLM.forward):
        return "its forward takes other arguments than a language model's"
    if module.loss_function is not ForCausalLMLoss:
        return "its loss is not that of the next token"
    if type(head) is not nn.Linear:
        return f"its head is {_class_name(head)}, not nn.Linear"
    return Swap(FusedCausalLM, dict(cache_name=cache_name(type(module).forward)))


def _arguments(forward: Any) -> list[str]:
    """The names of the arguments of a forward, in order, whatever it calls the cache."""
    own = cache_name(forward)
    return ["cache" if name == own else name for name in inspect.signature(forward).parameters]


def untouchable(module: nn.Module, *, recurse: bool = True) -> str | None:
    """Why a module must be left alone whatever its structure: somebody else runs it, or its parameters are not here."""
    for name, submodule in module.named_modules() if recurse else [("", module)]:
        where = f"its {name}" if name else "it"
        if is_dispatched(submodule):
            return f"{where} is dispatched or offloaded by accelerate"
        if "forward" in submodule.__dict__:
            return f"{where} has a forward of its own on the instance"
    for name, parameter in module.named_parameters(recurse=recurse):
        if type(parameter) not in (nn.Parameter, Tensor):
            return f"its {name} is a {type(parameter).__name__}, not a plain parameter"
        if parameter.device.type not in ("cpu", "cuda"):
            return f"its {name} is on {parameter.device.type}, where there are no kernels"
        if parameter.dtype not in _DTYPES:
            return f"its {name} is {str(parameter.dtype).removeprefix('torch.')}"
    return None


def _strange_projection(module: nn.Module, names: set[str]) -> str | None:
    """Names a projection that is neither nn.Linear nor an adapter around one (PEFT), so quantised ones too."""
    for name in sorted(names):
        base = base_layer(getattr(module, name))
        if type(base) is not nn.Linear:
            return f"its {name} is {_class_name(base)}, not nn.Linear"
    return None


def _class_name(module: nn.Module) -> str:
    """With the package, because quantised and adapted layers are called Linear too."""
    return f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"


def _dropout(module: nn.Module) -> str | None:
    """Names a dropout that a layer does by itself, beside that of attention, which the attention function does."""
    for name, rate in vars(module).items():
        if "drop" in name and name != "attention_dropout" and isinstance(rate, float) and rate > 0.0:
            return f"it drops out of its output: {name} is {rate:g}"
    return None


def first_line(error: Exception) -> str:
    """An error's message, as short as a table needs it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
