"""Tiny models with random weights, one of each family that `fuse` knows, and of some that it knows in part."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from llama_fast.fusion.verify import InFloat64
from llama_fast.kernels.parity import GRADIENT_FACTOR, OUTPUT_FACTOR, error_bound, relative_error

VOCAB = 97
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
EVERYTHING = dict(norm=5, mlp=2, rope=2, attention=2, residual=2, loss=1)

# family: (model class, settings beside SIZES, layers swapped in training mode)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "llama": ("Llama", {}, EVERYTHING),
    "llama3 rope": ("Llama", dict(rope_parameters=LLAMA3_ROPE), EVERYTHING),
    "mistral": ("Mistral", dict(sliding_window=5), EVERYTHING),
    "qwen2": ("Qwen2", {}, EVERYTHING),
    "qwen2 with a window": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=5, layer_types=["full_attention", "sliding_attention"]),
        EVERYTHING,
    ),
    "qwen3": ("Qwen3", {}, EVERYTHING | dict(norm=9)),
    "gemma": ("Gemma", {}, EVERYTHING),
    # its eager attention: before 5.23 transformers' sdpa drops Gemma 2's softcap without a word
    "gemma2": (
        "Gemma2",
        dict(sliding_window=5, attn_implementation="eager", attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        EVERYTHING | dict(norm=9, residual=0),
    ),
    "gemma3": (
        "Gemma3",
        dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        EVERYTHING | dict(norm=13, residual=0),
    ),
    "stablelm": ("StableLm", {}, EVERYTHING),  # LayerNorm, and rotates a quarter of each head
    "granite": (
        "Granite",
        dict(attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=3.0),
        EVERYTHING | dict(residual=0, loss=0),
    ),
    "phi3": ("Phi3", dict(sliding_window=5), EVERYTHING),
    "gpt-neox": ("GPTNeoX", {}, dict(norm=5, mlp=0, rope=0, attention=2, residual=0, loss=0)),
}


def make(
    family: str = "llama", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """A model in eval mode, the same one each time, with weights large enough for its tokens to differ."""
    name, more, _ = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = kind(**(SIZES | more | settings))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype)


def random_ids(batch: int = 2, length: int = 12, *, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def logits_in_float64(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """The logits of a model that is not fused, in float64 throughout."""
    with InFloat64():
        return logits(copy.deepcopy(model).double(), ids, **inputs)


def loss_and_gradients(model: nn.Module, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()[None]} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def gradients_in_float64(model: nn.Module, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    with InFloat64():
        return loss_and_gradients(copy.deepcopy(model).double(), ids, **inputs)


def assert_within_rule(what: str, actual: Tensor, peer: Tensor, expected: Tensor, *, gradient: bool = False) -> None:
    error, peer_error = relative_error(actual, expected), relative_error(peer, expected)
    bound = error_bound(peer_error, actual.dtype, factor=GRADIENT_FACTOR if gradient else OUTPUT_FACTOR)
    assert error <= bound, f"{what}: relative error {error:.3e}, transformers' {peer_error:.3e}, bound {bound:.3e}"


KINDS = {
    name: tuple(kinds.split())
    for name, kinds in dict(
        rms_norm="norm", add_rms_norm="norm", layer_norm="norm", add_layer_norm="norm", glu="mlp", rope="rope",
        attention="attention", attention_decode="attention", linear="residual", linear_cross_entropy="loss",
        norm_heads="norm rope", norm_swiglu="norm mlp", layer_tail="residual norm mlp residual",
    ).items()
}  # fmt: skip
"""Which kinds of swaps a fused op stands for."""


def assert_fused_ran(names: Sequence[str], swapped: dict[str, int], *, passes: int = 1, trains: bool = False) -> None:
    """Of the ops that ran (`CalledOps`) those of ours are those of `passes` passes: a layer that was not swapped gives the same numbers."""
    ours = (name.split(".")[1] for name in names if name.startswith("llama_fast.") and not name.endswith(".alone"))
    ran = Counter(kind for op in ours if not op.endswith("_backward") for kind in KINDS[op])
    times = dict(residual=2, rope=1 + trains, loss=int(trains))  # two sums a layer; RoPE is its own backward
    expected = {kind: passes * count * times.get(kind, 1) for kind, count in swapped.items()}
    assert dict(ran) == {kind: count for kind, count in expected.items() if count}


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """20 new tokens, greedily unless `options` say otherwise; what is drawn is drawn from the same seed."""
    torch.manual_seed(1)
    return model.generate(ids, **(dict(max_new_tokens=20, do_sample=False, pad_token_id=0) | options))
