"""Configs against transformers' own classes: defaults, old and new forms, what is refused, and the way back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llama_fast.decoder.checkpoint_layout import weight_bytes
from llama_fast.decoder.config import DecoderConfig, RopeConfig
from tests.decoder.published_configs import READ, REFUSED

SMALL: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0,
)  # fmt: skip
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8)
CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "phi3": transformers.Phi3Config,
    "stablelm": transformers.StableLmConfig,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True, head_dim=32, eos_token_id=[2, 5]),
    "llama3": dict(model_type="llama", tie_word_embeddings=True, rope_scaling=dict(rope_type="llama3") | LLAMA3),
    "linear": dict(model_type="llama", rope_scaling=dict(type="linear", factor=2.0), rope_theta=5000.0),
    "a type that reads no trained length": dict(
        model_type="llama", rope_scaling=dict(rope_type="default", original_max_position_embeddings=64)
    ),
    "flags that are off": dict(model_type="qwen2", use_mrope=False, use_sliding_window=False, sliding_window=9),
    "a mistral's window stays whatever another family's flag says": dict(
        model_type="mistral", sliding_window=7, use_sliding_window=False
    ),
    "new form": dict(model_type="llama", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=5000.0)),
    "yarn": dict(model_type="qwen2", rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=64)),
    "mistral": dict(model_type="mistral", sliding_window=7),
    "mistral, no window": dict(model_type="mistral", sliding_window=None, eos_token_id=None),
    "qwen2 with windows": dict(model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": dict(
        model_type="qwen3", attention_bias=True, use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": dict(
        model_type="phi3", rope_scaling=dict(type="longrope", **LONGROPE), original_max_position_embeddings=64,
        sliding_window=100,
    ),
    "phi3, part of a head": dict(model_type="phi3", partial_rotary_factor=0.5, num_key_value_heads=None),
    "stablelm": dict(model_type="stablelm", use_qkv_bias=True, partial_rotary_factor=0.5, layer_norm_eps=1e-4),
}  # fmt: skip


def assert_same(config: DecoderConfig, theirs: Any) -> None:
    """`config` says what transformers' config object says."""
    heads = theirs.num_attention_heads
    assert config.vocab_size == theirs.vocab_size and config.hidden_size == theirs.hidden_size
    assert config.intermediate_size == theirs.intermediate_size and config.num_layers == theirs.num_hidden_layers
    assert config.num_heads == heads and config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert config.max_positions == theirs.max_position_embeddings
    assert config.norm_eps == getattr(theirs, "rms_norm_eps", None) or config.norm_eps == theirs.layer_norm_eps
    assert config.tied_embeddings == theirs.tie_word_embeddings and config.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert config.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    window, types = getattr(theirs, "sliding_window", None), getattr(theirs, "layer_types", None)
    types = types or ["sliding_attention"] * config.num_layers
    assert config.windows == tuple(window if kind == "sliding_attention" else None for kind in types)
    rope = dict(theirs.rope_parameters)
    assert (config.rope.rope_type, config.rope.theta) == (rope.pop("rope_type"), rope.pop("rope_theta"))
    assert config.rope.partial_rotary_factor == (rope.pop("partial_rotary_factor", None) or 1.0)
    rope.pop("type", None)
    assert config.rope.parameters == rope


@pytest.mark.parametrize("model_type", CLASSES)
def test_defaults_are_those_of_transformers(model_type):
    assert_same(DecoderConfig.from_huggingface({"model_type": model_type}), CLASSES[model_type]())


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_read_as_transformers_reads_them(name, tmp_path):
    given = json.loads(json.dumps(SMALL | SETTINGS[name]))
    theirs = CLASSES[given["model_type"]].from_dict(json.loads(json.dumps(given)))
    config = DecoderConfig.from_huggingface(given)
    assert_same(config, theirs)

    theirs.save_pretrained(tmp_path)  # the form of transformers 5
    assert DecoderConfig.from_huggingface(json.loads((tmp_path / "config.json").read_text())) == config

    written = json.loads(json.dumps(config.to_huggingface()))
    assert_same(config, CLASSES[given["model_type"]].from_dict(written))


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_layers_have_is_what_transformers_layers_have(name):
    given = SMALL | SETTINGS[name]
    config = DecoderConfig.from_huggingface(given)
    theirs = CLASSES[given["model_type"]].from_dict(json.loads(json.dumps(given)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    names = dict(model.named_parameters())
    layer = "model.layers.0."
    attention = "qkv_proj" if config.model_type == "phi3" else "q_proj"
    assert config.qkv_bias == (f"{layer}self_attn.{attention}.bias" in names)
    assert config.output_bias == (f"{layer}self_attn.o_proj.bias" in names)
    assert config.mlp_bias == (f"{layer}mlp.down_proj.bias" in names)
    assert config.head_norm == (f"{layer}self_attn.q_norm.weight" in names)
    assert config.layer_norm == (f"{layer}input_layernorm.bias" in names)
    assert config.tied_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_read_as_transformers_reads_it(name):
    billions, given = READ[name]
    given = json.loads(json.dumps(given))
    config = DecoderConfig.from_huggingface(given)
    assert_same(config, CLASSES[given["model_type"]].from_dict(given))
    digits = len(billions.partition(".")[2])
    assert f"{weight_bytes(config, torch.int8) / 1e9:.{digits}f}" == billions
    assert DecoderConfig.from_huggingface(json.loads(json.dumps(config.to_huggingface()))) == config


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_that_asks_for_more_is_refused_by_name(name):
    message, given = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_huggingface(SMALL | given)


def test_a_published_config_with_fields_of_other_tools_is_read():
    """SmolLM2's config.json names what it does not use, and null stands for what is not set."""
    others = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    nulls = {"rope_scaling": None, "head_dim": None, "quantization_config": None, "something_new": None}
    config = DecoderConfig.from_huggingface(SMALL | {"model_type": "llama", "_name_or_path": "x"} | others | nulls)
    assert config.head_dim == 16 and config.rope == RopeConfig()


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_mrope=False),
        dict(use_flash_attention_2=True),
        dict(use_flash_attention_2=False),
        dict(max_sequence_length=4096),
        dict(hidden_act="swish"),
        dict(activation="swiglu"),
        dict(logit_scale=1.0, residual_multiplier=1, rotary_pct=1.0),
        dict(sliding_window=4096, use_sliding_window=False, max_window_layers=1),
        dict(attention_bias=None, mlp_bias=0, bias=False, qkv_bias=False, tie_word_embeddings=None),
        dict(bos_token_id=[1], eos_token_id=[2], pad_token_id=-1),
        dict(rope_theta=10000, rope_scaling={}),
        dict(gradient_checkpointing=True, attention_dropout=0.1, pretraining_tp=2),
        dict(
            torch_dtype="bfloat16",
            transformers_version="4.31.0",
            auto_map={"AutoConfig": "x.Y"},
            _attn_implementation="eager",
        ),
        dict(layer_types=["full_attention"] * 3),
    ],
)
def test_a_field_that_changes_nothing_is_no_matter(fields):
    plain = DecoderConfig.from_huggingface(SMALL | {"model_type": "llama"})
    assert DecoderConfig.from_huggingface(SMALL | {"model_type": "llama"} | fields) == plain


def test_phi3s_first_name_for_longrope_is_known():
    """transformers 5.23 refuses a `su` that keeps its trained length outside, as Phi-3's first releases do."""
    old, new = (
        SMALL | SETTINGS["phi3"] | dict(rope_scaling=dict(type=name, **LONGROPE)) for name in ("su", "longrope")
    )
    assert DecoderConfig.from_huggingface(old) == DecoderConfig.from_huggingface(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gpt_neox"), "llama, mistral, qwen2, qwen3, phi3, stablelm, got 'gpt_neox'"),
        (dict(model_type=None), "got None"),
        (dict(hidden_act="gelu"), "hidden_act must be 'silu'.*'gelu'"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(logit_scale=2.0), r"logit_scale \(2.0\)"),
        (dict(rope_interleaved=True), "rope_interleaved"),
        (dict(use_mrope=True), r"use_mrope \(True\)"),
        (dict(model_type="qwen2", use_mrope=True), "qwen2 config .* use_mrope"),
        (dict(activation="gelu"), r"activation \('gelu'\)"),
        (dict(hidden_activation="gelu_pytorch_tanh"), "hidden_activation"),
        (dict(bias=True), r"bias \(True\)"),
        (dict(rotary_pct=0.25), "rotary_pct"),
        (dict(something_new=False), r"something_new \(False\)"),
        (dict(vision_config=dict(hidden_size=8)), "vision_config"),
        (dict(sliding_window=5, use_sliding_window=True), "sliding_window.*use_sliding_window"),
        (dict(attention_bias="false"), "attention_bias must be true or false, got 'false'"),
        (dict(tie_word_embeddings="true"), "tie_word_embeddings must be true or false"),
        (dict(model_type="qwen2", use_sliding_window="no"), "use_sliding_window must be true or false"),
        (dict(rms_norm_eps="1e-05"), "norm_eps must be a number, got '1e-05'"),
        (dict(rms_norm_eps=None), "norm_eps must be a number, got None"),
        (dict(rms_norm_eps=0.0), "norm_eps must be positive"),
        (dict(rope_theta="10000"), "rope_theta must be a number, got '10000'"),
        (dict(eos_token_id="2"), "eos_token_id must hold token ids, got '2'"),
        (dict(bos_token_id=[1, 2]), "bos_token_id must be one token"),
        (dict(rope_scaling="linear"), "rope_scaling must be an object or null, got 'linear'"),
        (dict(rope_scaling=dict(type="linear", factor=None)), "'linear' needs factor"),
        (dict(rope_scaling=dict(type="linear", factor="2.0")), "RoPE's factor must be a number, got '2.0'"),
        (dict(rope_scaling=dict(type="su", **LONGROPE)), "got 'su'"),
        (dict(rope_scaling=dict(type="default", mrope_section=[2, 3, 3])), "'default' has no mrope_section"),
        (dict(residual_multiplier=0.2, embedding_multiplier=12.0), "residual_multiplier.*embedding_multiplier"),
        (dict(sliding_window=5), r"llama config has fields that are not supported: sliding_window \(5\)"),
        (dict(model_type="mistral", attention_bias=True), "attention_bias"),
        (dict(model_type="stablelm", use_parallel_residual=True), "use_parallel_residual"),
        (dict(model_type="stablelm", qk_layernorm=True), "qk_layernorm"),
        (dict(model_type="qwen2", layer_types=["sliding_attention"] * 3), "sliding_window=None"),
        (dict(model_type="qwen2", layer_types=["linear_attention"] * 3), "linear_attention"),
        (dict(model_type="mistral", layer_types=["full_attention"] * 3), "must agree with sliding_window"),
        (dict(rope_scaling=dict(type="mrope")), "rope_type must be one of default, linear.*'mrope'"),
        (dict(rope_scaling=dict(type="linear")), "'linear' needs factor"),
        (dict(rope_scaling=dict(type="linear", factor=2.0, power=3)), "'linear' has no power"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor of a llama"),
        (dict(model_type="phi3", rope_scaling=dict(type="longrope", short_factor=[1], long_factor=[1])), "8 numbers"),
        (dict(num_key_value_heads=3), "multiple of num_kv_heads"),
        (dict(num_attention_heads=6), "multiple of num_attention_heads"),
        (dict(head_dim=15), "even part of a head"),
        (dict(hidden_size=0), "hidden_size must be a positive integer"),
        (dict(vocab_size="97"), "vocab_size must be a positive integer"),
        (dict(hidden_size="64"), "hidden_size must be a positive integer, got '64'"),
        (dict(num_hidden_layers=2.0), "num_hidden_layers must be a positive integer, got 2.0"),
        (dict(model_type="mistral", sliding_window=0), "windows must hold"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_huggingface(SMALL | {"model_type": "llama"} | change)


def test_a_config_that_its_family_cannot_say_is_not_written():
    config = DecoderConfig.from_huggingface(SMALL | {"model_type": "llama"})
    with pytest.raises(ValueError, match="llama config cannot describe"):
        DecoderConfig(**(vars(config) | dict(qkv_bias=True))).to_huggingface()


def test_the_embedded_model_is_read():
    folder = Path(__file__).parents[2] / "llama_fast" / "demo_model"
    config = DecoderConfig.from_huggingface(json.loads((folder / "config.json").read_text()))
    assert_same(config, transformers.AutoConfig.from_pretrained(folder))


# What Meta's params.json and the config.json of the same release on the hub say
META = {
    "Llama-2-7b": (
        dict(dim=4096, multiple_of=256, n_heads=32, n_layers=32, norm_eps=1e-5, vocab_size=-1),
        32000, dict(intermediate_size=11008, num_kv_heads=32, max_positions=4096, rope=RopeConfig()),
    ),
    "Llama-2-70b": (
        dict(dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-5,
             vocab_size=-1),
        32000, dict(intermediate_size=28672, num_kv_heads=8, head_dim=128),
    ),
    "Meta-Llama-3-8B": (
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=1024,
             ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=500000.0),
        128256, dict(intermediate_size=14336, max_positions=8192, rope=RopeConfig(theta=500000.0), bos_token_id=128000),
    ),
    "Llama-3.1-8B": (
        dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=1024,
             ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
        128256, dict(intermediate_size=14336, max_positions=131072, rope=RopeConfig(
            "llama3", 500000.0, parameters=LLAMA3 | dict(original_max_position_embeddings=8192))),
    ),
    "Llama-3.2-1B": (
        dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=256,
             ffn_dim_multiplier=1.5, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
        128256, dict(intermediate_size=8192, head_dim=64, rope=RopeConfig(
            "llama3", 500000.0, parameters=LLAMA3 | dict(factor=32.0, original_max_position_embeddings=8192))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_metas_params_give_the_published_config(name):
    params, vocab, expected = META[name]
    config = DecoderConfig.from_meta(params, vocab_size=vocab)
    assert config.vocab_size == vocab and {key: getattr(config, key) for key in expected} == expected
    assert DecoderConfig.from_huggingface(config.to_huggingface()) == config


def test_a_field_of_metas_that_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match="moe_args"):
        DecoderConfig.from_meta(META["Llama-2-7b"][0] | dict(moe_args={}), vocab_size=32000)
