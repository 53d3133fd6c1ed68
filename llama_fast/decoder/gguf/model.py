"""What a GGUF file says of its model: the config, and where each of its tensors goes.

llama.cpp's converter stores the rows of q and k of a llama as Meta does, pairs of a rotation side by side, and those of a
qwen2 as Hugging Face does. It writes Llama 3's scaled RoPE not as its four numbers but as what they come to for each pair.
"""

import re
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint_layout import Slot, huggingface_slots
from ..config import DecoderConfig, RopeConfig
from ..rotary import inverse_frequencies
from .file import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"  # part of the config, though it is a tensor
_ARCHITECTURES = ("llama", "qwen2")
# Of `<architecture>.`: what is read here, or changes no number of the forward pass
_KNOWN = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "tensor_data_layout", "vocab_size",
}  # fmt: skip
_REQUIRED = (
    "attention.head_count", "attention.layer_norm_rms_epsilon", "block_count", "context_length", "embedding_length",
    "feed_forward_length",
)  # fmt: skip
# What changes the result, with the one value that leaves it as it is
_NEUTRAL = {
    "attention.causal": True, "attention.sliding_window": 0, "expert_count": 0, "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0,
    "use_parallel_residual": False,
}  # fmt: skip
# The numbers of every Llama 3.1, 3.2 and 3.3 but the factor
_LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def config_of(file: GGUFFile) -> DecoderConfig:
    """The config; what a layer has (biases, a head of its own) is seen by the tensors that are there.

    Raises ValueError for an architecture or a key that is not known here, or one that is missing, naming it.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture!r}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no token_embd.weight: it holds no whole model")
    values = _values(file, architecture)
    layers, heads, hidden = (values[key] for key in ("block_count", "attention.head_count", "embedding_length"))
    head_dim = values.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {architecture}.{key} must be {head_dim}, as a key has, got {values[key]}")
    bos, eos = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return DecoderConfig(
        model_type=architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=values["feed_forward_length"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=values.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_positions=values["context_length"],
        norm_eps=values["attention.layer_norm_rms_epsilon"],
        windows=(None,) * layers,
        rope=_rope(file, values, head_dim),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        tied_embeddings="output.weight" not in file.tensors,
        bos_token_id=bos,
        eos_token_ids=() if eos is None else (eos,),
    )


def slots_of(config: DecoderConfig) -> dict[str, Slot]:
    """The place of each tensor of the file, by its name there."""
    slots = {_name(theirs): slot for theirs, slot in huggingface_slots(config).items()}
    if config.model_type == "llama":
        for i in range(config.num_layers):
            for name, heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
                for kind in {"weight", "bias"} if config.qkv_bias else {"weight"}:
                    key = f"blk.{i}.{name}.{kind}"
                    slots[key] = replace(slots[key], interleaved_heads=heads)
    return slots


def _name(theirs: str) -> str:
    """llama.cpp's name of a tensor, from that of Hugging Face."""
    layer, name, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", theirs).groups()  # type: ignore[union-attr]
    return f"{'' if layer is None else f'blk.{layer}.'}{_NAMES[name]}.{kind}"


def _values(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The architecture's keys, without their prefix; ValueErrors for those that are not known or not there."""
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    unknown = [
        f"{prefix}{key} ({value!r})"
        for key, value in values.items()
        if isinstance(value, list) or (key not in _KNOWN and (key not in _NEUTRAL or value != _NEUTRAL[key]))
    ]
    if unknown:
        raise ValueError(f"{file.path} has keys that are not supported: {', '.join(unknown)}")
    if missing := [prefix + key for key in _REQUIRED if key not in values]:
        raise ValueError(f"{file.path} has no {', '.join(missing)}")
    return values


def _rope(file: GGUFFile, values: dict[str, Any], head_dim: int) -> RopeConfig:
    """RoPE; where the type of its scaling is not said, a factor is that of linear scaling, as in llama.cpp."""
    theta = values.get("rope.freq_base", 10000.0)
    if ROPE_FACTORS in file.tensors:
        return _llama3(file, theta, head_dim)
    rope_type = values.get("rope.scaling.type", "linear")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0))
    if rope_type == "none" or (rope_type == "linear" and factor == 1.0):
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig("linear", theta, parameters={"factor": factor})
    if rope_type == "yarn":
        trained = values.get("rope.scaling.original_context_length", values["context_length"])
        betas = {name: values.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        parameters = {"factor": factor, "original_max_position_embeddings": trained}
        return RopeConfig("yarn", theta, parameters=parameters | {k: v for k, v in betas.items() if v is not None})
    raise ValueError(f"{file.path}: rope.scaling.type must be none, linear or yarn, got {rope_type!r}")


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> RopeConfig:
    """Llama 3's scaled RoPE, whose numbers must give the factors that the file holds: how many times slower each pair turns."""
    factors = file.tensors[ROPE_FACTORS].read()
    rope = RopeConfig("llama3", theta, parameters=_LLAMA3 | {"factor": round(factors.max().item(), 4)})
    plain, scaled = (inverse_frequencies(each, head_dim, 0)[0] for each in (RopeConfig(theta=theta), rope))
    if factors.shape != plain.shape or not torch.allclose(plain / factors, scaled, rtol=1e-4, atol=0.0):
        raise ValueError(f"{file.path}: {ROPE_FACTORS} does not hold the factors of a Llama 3: {factors.tolist()}")
    return rope
