"""What a decoder is: the numbers of a Hugging Face `config.json` or of Meta's `params.json`, read once and checked.

Families differ by data, not by code: a `DecoderConfig` says what a layer has (biases, norms of the heads, windows), so
nothing but this file and `checkpoint.py` asks which family a model is of. A field that is not known and could change the
result is an error that names it (`config_fields.py`).
"""

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_fields import (
    ARCHITECTURES,
    FAMILIES,
    META_FIELDS,
    NEUTRAL,
    PARTLY_ROTATED,
    QUANTISED,
    ROPE_FIELDS,
    ROPE_TYPES,
    SILU,
    WITHOUT_EFFECT,
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: its type, base, the rotated share of a head, and what the type needs beside."""

    rope_type: str = "default"
    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {self.rope_type!r}")
        required, optional = ROPE_TYPES[self.rope_type]
        if missing := {name for name in required if self.parameters.get(name) is None}:
            raise ValueError(f"RoPE of type {self.rope_type!r} needs {', '.join(sorted(missing))}")
        if unknown := self.parameters.keys() - required - optional:
            raise ValueError(f"RoPE of type {self.rope_type!r} has no {', '.join(sorted(unknown))}")
        for name, value in self.parameters.items():
            for number in value if isinstance(value, list | tuple) else [] if value is None else [value]:
                _number(f"RoPE's {name}", number)


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
            _check_size(name, getattr(self, name))
        if _number("norm_eps", self.norm_eps) <= 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
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
        _reject_unsupported(config)
        model_type = config["model_type"]
        values = FAMILIES[model_type] | dict(config)
        if values["hidden_act"] not in SILU:
            raise ValueError(
                f"hidden_act must be {' or '.join(map(repr, SILU))} (the MLP is SwiGLU), got {values['hidden_act']!r}"
            )
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):  # what is computed with below
            _check_size(name, values[name])
        heads, bos = values["num_attention_heads"], _token_ids(values, "bos_token_id")
        if len(bos) > 1:
            raise ValueError(f"bos_token_id must be one token, got {values['bos_token_id']!r}")
        if values["head_dim"] is None and values["hidden_size"] % heads:
            raise ValueError(
                f"hidden_size ({values['hidden_size']}) must be a multiple of num_attention_heads ({heads})"
            )
        bias = _flag(values, "attention_bias")
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
            qkv_bias=bias or model_type == "qwen2" or _flag(values, "use_qkv_bias"),
            output_bias=bias,
            mlp_bias=_flag(values, "mlp_bias"),
            head_norm=model_type == "qwen3",
            tied_embeddings=_flag(values, "tie_word_embeddings"),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=_token_ids(values, "eos_token_id"),
        )

    def to_huggingface(self) -> dict[str, Any]:
        """What a `config.json` holds, in the form of transformers 5. Raises ValueError where the family cannot say it."""
        eos = self.eos_token_ids
        values: dict[str, Any] = dict(
            model_type=self.model_type,
            architectures=[ARCHITECTURES[self.model_type]],
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
        if self.model_type in PARTLY_ROTATED:
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
        if unknown := [name for name in params if name not in META_FIELDS and params[name] is not None]:
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


def _reject_unsupported(config: Mapping[str, Any]) -> None:
    """A ValueError that names the family, or every field that could change the result, where it is not understood."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        own = _unsupported(config, frozenset().union(*FAMILIES.values()))
        why = f", whose config has {', '.join(own)}" if own else ""
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}{why}")
    for name in QUANTISED:
        if config.get(name) is not None:
            raise ValueError(f"{name}: quantised checkpoints are not supported; load the unquantised model")
    if unsupported := _unsupported(config, FAMILIES[model_type].keys()):
        raise ValueError(f"a {model_type} config has fields that are not supported: {', '.join(unsupported)}")


def _unsupported(config: Mapping[str, Any], own: Collection[str]) -> list[str]:
    """The fields, with their values, that are not of the family's `own` ones and may change the result."""
    unread = "sliding_window" if config.get("use_sliding_window") is False else None
    return [
        f"{name} ({reprlib.repr(value)})"
        for name, value in config.items()
        if name not in own and name not in ROPE_FIELDS and name not in WITHOUT_EFFECT and not name.startswith("_")
        if value is not None and value not in NEUTRAL.get(name, ()) and name != unread
    ]


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if value not in (None, False, True):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return bool(value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _token_ids(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The ids of a field that holds one, several or none."""
    value = values[name]
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ValueError(f"{name} must hold token ids, got {value!r}")
    return ids


def _windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Each layer's sliding window, from `sliding_window` and, in Qwen, from `layer_types` or `max_window_layers`."""
    layers, types = values["num_hidden_layers"], values["layer_types"]
    own = FAMILIES[values["model_type"]]
    window = values["sliding_window"] if "sliding_window" in own else None
    if "use_sliding_window" in own:
        window = window if _flag(values, "use_sliding_window") else None
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
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling must be an object or null, got {scaling!r}")
    given = dict(scaling)
    legacy = given.pop("type", None)
    rope_type = given.pop("rope_type", None) or legacy or "default"
    if values["model_type"] == "phi3" and rope_type in ("su", "yarn"):
        rope_type = "longrope"  # what Phi-3's first configs called it
    theta = given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    partial = given.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    if partial != 1.0 and values["model_type"] not in PARTLY_ROTATED:
        raise ValueError(f"partial_rotary_factor of a {values['model_type']} must be 1, got {partial}")
    if rope_type in ("llama3", "yarn", "longrope"):  # beside rope_parameters it counts more than inside, as in Phi-3
        length = values.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = length or values["max_position_embeddings"]
    return RopeConfig(rope_type, _number("rope_theta", theta), _number("partial_rotary_factor", partial), given)


def _meta_rope(params: Mapping[str, Any], scaled: bool) -> RopeConfig:
    """Llama 3.1 and later scale RoPE: by 8, or by 32 in Llama 3.2's two sizes, whose `params.json` may not say so."""
    theta = float(params.get("rope_theta", 10000.0))
    if not scaled:
        return RopeConfig(theta=theta)
    factor = params.get("rope_scaling_factor") or (32.0 if params["dim"] < 4096 else 8.0)
    parameters = dict(factor=float(factor), low_freq_factor=1.0, high_freq_factor=4.0)
    return RopeConfig("llama3", theta, parameters=parameters | {"original_max_position_embeddings": 8192})
