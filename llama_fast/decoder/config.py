"""What a decoder is: the numbers of a Hugging Face `config.json` or of Meta's `params.json`, read once and checked.

Families differ by data, not by code: a `DecoderConfig` says what a layer has (biases, norms of the heads, windows), so
nothing but this file and `checkpoint.py` asks which family a model is of. A field that is not known and could change the
result is an error that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Each family's fields, with the values its transformers class has where a config.json leaves them out.
_COMMON: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, head_dim=None, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, layer_types=None,
)  # fmt: skip
_QWEN: dict[str, Any] = _COMMON | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    bos_token_id=None, eos_token_id=None, use_sliding_window=False, sliding_window=4096, max_window_layers=28,
)  # fmt: skip
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | dict(attention_bias=False, mlp_bias=False),
    "mistral": _COMMON | dict(
        intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096,
    ),
    "qwen2": _QWEN,
    "qwen3": _QWEN | dict(head_dim=128, attention_bias=False),
    "phi3": _COMMON | dict(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5,
        original_max_position_embeddings=4096, eos_token_id=32000, sliding_window=None,
    ),
    "stablelm": _COMMON | dict(
        vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_key_value_heads=32,
        max_position_embeddings=4096, layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, use_qkv_bias=False,
        partial_rotary_factor=0.25,
    ),
}  # fmt: skip
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM", "stablelm": "StableLmForCausalLM",
}  # fmt: skip
_PARTLY_ROTATED = ("phi3", "stablelm")  # transformers' other families rotate the whole head whatever the config says

# Fields that change no number of the forward pass: training, bookkeeping, defaults of generation.
_WITHOUT_EFFECT = _names(
    """architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward classifier_dropout cls_token_id decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout id2label initializer_range is_llama_config label2id
    length_penalty max_length max_window_layers min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache"""
)
# Fields that change the result, with the one value that leaves it as it is.
_NEUTRAL: dict[str, Any] = dict(
    add_cross_attention=False, full_attn_mod=1, interpolate_factor=1, is_decoder=False, is_encoder_decoder=False,
    lm_head_bias=False, pruned_heads={}, qk_layernorm=False, rope_interleaved=False, tie_encoder_decoder=False,
    use_parallel_residual=False, use_sliding_window=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip
_META_FIELDS = _names(
    """dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta use_scaled_rope
    rope_scaling_factor max_seq_len max_batch_size model_parallel_size"""
)
_ROPE_FIELDS = _names("rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings")
# rope_type: what it needs, what it may have. (`finetuned` is a note of the YaRN authors; nothing reads it.)
_ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"},
    ),
    "longrope": (
        {"short_factor", "long_factor", "original_max_position_embeddings"},
        {"factor", "attention_factor"},
    ),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: its type, base, the rotated share of a head, and what the type needs beside."""

    rope_type: str = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.rope_type not in _ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(_ROPE_TYPES)}, got {self.rope_type!r}")
        required, optional = _ROPE_TYPES[self.rope_type]
        if missing := required - self.parameters.keys():
            raise ValueError(f"RoPE of type {self.rope_type!r} needs {', '.join(sorted(missing))}")
        if unknown := self.parameters.keys() - required - optional:
            raise ValueError(f"RoPE of type {self.rope_type!r} has no {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-like decoder. Sizes count elements; `windows` holds each layer's sliding window, None for full attention.

    A window of w lets query i see the keys j with i - w < j <= i.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    windows: tuple[int | None, ...]
    rope: RopeConfig
    layer_norm: bool = False  # LayerNorm instead of RMSNorm
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    head_norm: bool = False  # RMSNorm of each query and key head
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_positions"
        for name in sizes.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"RoPE rotates an even part of a head of {self.head_dim}, got {self.rotary_dim}")
        if len(self.windows) != self.num_layers or not all(w is None or w > 0 for w in self.windows):
            raise ValueError(f"windows must hold None or a positive number for each of {self.num_layers} layers")
        for name in {"short_factor", "long_factor"} & self.rope.parameters.keys():
            if len(self.rope.parameters[name]) != self.rotary_dim // 2:
                raise ValueError(
                    f"RoPE's {name} needs {self.rotary_dim // 2} numbers, got {len(self.rope.parameters[name])}"
                )

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are rotated, its first ones."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads what a `config.json` holds, in the form of transformers 4 or 5.

        Raises ValueError for a family or a field that is not known here, naming it.
        """
        model_type = config.get("model_type")
        if model_type not in _FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(_FAMILIES)}, got {model_type!r}")
        _reject_unknown(config, model_type)
        values = _FAMILIES[model_type] | dict(config)
        if values["hidden_act"] != "silu":
            raise ValueError(f"hidden_act must be 'silu' (the MLP is SwiGLU), got {values['hidden_act']!r}")
        heads, eos = values["num_attention_heads"], values["eos_token_id"]
        if values["head_dim"] is None and values["hidden_size"] % heads:
            raise ValueError(
                f"hidden_size ({values['hidden_size']}) must be a multiple of num_attention_heads ({heads})"
            )
        bias = bool(values.get("attention_bias"))
        return cls(
            model_type=model_type,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
            head_dim=values["hidden_size"] // heads if values["head_dim"] is None else values["head_dim"],
            max_positions=values["max_position_embeddings"],
            norm_eps=values["layer_norm_eps" if model_type == "stablelm" else "rms_norm_eps"],
            windows=_windows(values),
            rope=_rope(values),
            layer_norm=model_type == "stablelm",
            qkv_bias=bias or model_type == "qwen2" or bool(values.get("use_qkv_bias")),
            output_bias=bias,
            mlp_bias=bool(values.get("mlp_bias")),
            head_norm=model_type == "qwen3",
            tied_embeddings=bool(values["tie_word_embeddings"]),
            bos_token_id=values["bos_token_id"],
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )

    def to_huggingface(self) -> dict[str, Any]:
        """What a `config.json` holds, in the form of transformers 5. Raises ValueError where the family cannot say it."""
        eos = self.eos_token_ids
        values: dict[str, Any] = dict(
            model_type=self.model_type,
            architectures=[_ARCHITECTURES[self.model_type]],
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            hidden_act="silu",
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=self.tied_embeddings,
            bos_token_id=self.bos_token_id,
            pad_token_id=None,  # said, for Phi-3's default is 32000 whatever the vocabulary
            eos_token_id=list(eos) if len(eos) > 1 else eos[0] if eos else None,
            rope_parameters={
                "rope_type": self.rope.rope_type,
                "rope_theta": self.rope.theta,
                **self.rope.parameters,
            },
        )
        if self.model_type in _PARTLY_ROTATED:
            values["rope_parameters"]["partial_rotary_factor"] = self.rope.partial_rotary_factor
        values |= self._family_fields()
        if DecoderConfig.from_huggingface(values) != self:
            raise ValueError(f"a {self.model_type} config cannot describe {self}")
        return values

    def _family_fields(self) -> dict[str, Any]:
        if self.model_type == "stablelm":
            return dict(layer_norm_eps=self.norm_eps, use_qkv_bias=self.qkv_bias)
        values: dict[str, Any] = dict(head_dim=self.head_dim, rms_norm_eps=self.norm_eps)
        if self.model_type in ("llama", "qwen3"):
            values["attention_bias"] = self.output_bias
        if self.model_type == "llama":
            values["mlp_bias"] = self.mlp_bias
        if self.model_type in ("mistral", "phi3"):
            values["sliding_window"] = self.windows[0]
        if self.model_type in ("qwen2", "qwen3"):
            window = next((w for w in self.windows if w is not None), None)
            values |= dict(
                sliding_window=window,
                use_sliding_window=window is not None,
                layer_types=["full_attention" if w is None else "sliding_attention" for w in self.windows],
            )
        if self.model_type == "phi3":
            values["original_max_position_embeddings"] = self.rope.parameters.get(
                "original_max_position_embeddings", self.max_positions
            )
        return values

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], *, vocab_size: int, tied_embeddings: bool = False) -> "DecoderConfig":
        """Reads what Meta's `params.json` holds.

        The file says neither how long a context the model was trained for nor its special tokens, and `vocab_size` is
        -1 in Llama 1 and 2: the caller takes that from the embedding, and the rest follows from the vocabulary, the
        RoPE base and whether it is scaled, as in Meta's releases (Llama 3 has 128256 tokens and a base of 500000).
        """
        if unknown := [name for name in params if name not in _META_FIELDS and params[name] is not None]:
            raise ValueError(f"params.json has fields that are not known here: {', '.join(unknown)}")
        dim, heads = params["dim"], params["n_heads"]
        inner, multiple = int(8 * dim / 3), params["multiple_of"]
        if params.get("ffn_dim_multiplier") is not None:
            inner = int(params["ffn_dim_multiplier"] * inner)
        llama3, scaled = vocab_size >= 128000, bool(params.get("use_scaled_rope"))
        return cls(
            model_type="llama",
            vocab_size=vocab_size,
            hidden_size=dim,
            intermediate_size=multiple * ((inner + multiple - 1) // multiple),
            num_layers=params["n_layers"],
            num_heads=heads,
            num_kv_heads=params.get("n_kv_heads") or heads,
            head_dim=dim // heads,
            max_positions=131072 if scaled else params.get("max_seq_len") or (8192 if llama3 else 4096),
            norm_eps=params["norm_eps"],
            windows=(None,) * params["n_layers"],
            rope=_meta_rope(params, scaled),
            tied_embeddings=tied_embeddings,
            bos_token_id=128000 if llama3 else 1,
            eos_token_ids=(128001, 128008, 128009) if llama3 else (2,),
        )


def _reject_unknown(config: Mapping[str, Any], model_type: str) -> None:
    """A ValueError that names every field which could change the result and is not understood."""
    if config.get("quantization_config") is not None:
        raise ValueError("quantization_config: quantised checkpoints are not supported; load the unquantised model")
    known = _FAMILIES[model_type].keys() | _WITHOUT_EFFECT | _ROPE_FIELDS
    unknown = [
        f"{name} ({value!r})"
        for name, value in config.items()
        if name not in known and value is not None and not name.startswith("_")
        if name not in _NEUTRAL or value != _NEUTRAL[name]
    ]
    if unknown:
        raise ValueError(f"a {model_type} config has fields that are not supported: {', '.join(unknown)}")


def _windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's sliding window, from `sliding_window` and, in Qwen, from `layer_types` or `max_window_layers`."""
    layers, types = values["num_hidden_layers"], values["layer_types"]
    window = values.get("sliding_window")
    if "use_sliding_window" in _FAMILIES[values["model_type"]]:
        window = window if values["use_sliding_window"] else None
        windows = [window if i >= values["max_window_layers"] else None for i in range(layers)]
    else:
        windows = [window] * layers
        if types is not None and set(types) != {"full_attention" if window is None else "sliding_attention"}:
            raise ValueError(f"layer_types of a {values['model_type']} must agree with sliding_window, got {types}")
    if types is None:
        return tuple(windows)
    for kind in types:
        if kind != "full_attention" and (kind != "sliding_attention" or window is None):
            raise ValueError(f"layer_types holds {kind!r} with sliding_window={window}: expected 'full_attention'")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope(values: Mapping[str, Any]) -> RopeConfig:
    """RoPE from `rope_scaling` and `rope_theta` (transformers 4) or from `rope_parameters` (5), as transformers 5 does."""
    given = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    legacy = given.pop("type", None)
    rope_type = given.pop("rope_type", None) or legacy or "default"
    if values["model_type"] == "phi3" and rope_type in ("su", "yarn"):
        rope_type = "longrope"  # what Phi-3's first configs called it
    theta = given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    partial = given.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    if partial != 1.0 and values["model_type"] not in _PARTLY_ROTATED:
        raise ValueError(f"partial_rotary_factor of a {values['model_type']} must be 1, got {partial}")
    if rope_type in ("llama3", "yarn", "longrope"):  # beside rope_parameters it counts more than inside, as in Phi-3
        length = values.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = length or values["max_position_embeddings"]
    return RopeConfig(rope_type, float(theta), float(partial), given)


def _meta_rope(params: Mapping[str, Any], scaled: bool) -> RopeConfig:
    """Llama 3.1 and later scale RoPE: by 8, or by 32 in Llama 3.2's two sizes, whose `params.json` may not say so."""
    theta = float(params.get("rope_theta", 10000.0))
    if not scaled:
        return RopeConfig(theta=theta)
    factor = params.get("rope_scaling_factor") or (32.0 if params["dim"] < 4096 else 8.0)
    parameters = dict(factor=float(factor), low_freq_factor=1.0, high_freq_factor=4.0)
    return RopeConfig("llama3", theta, parameters=parameters | {"original_max_position_embeddings": 8192})
