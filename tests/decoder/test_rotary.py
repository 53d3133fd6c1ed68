"""Rotary position embeddings of every type against transformers' own modules, to the bit (but `dynamic`)."""

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_fast.decoder.config import DecoderConfig
from llama_fast.decoder.rotary import RotaryTable, inverse_frequencies

SIZES: dict[str, Any] = dict(
    vocab_size=8, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rope_theta=50000.0, pad_token_id=0,
)  # fmt: skip
FACTORS = dict(short_factor=[1.0 + i / 16 for i in range(16)], long_factor=[1.0 + i for i in range(16)])
ROPES: dict[str, dict[str, Any]] = {
    "default": dict(model_type="llama"),
    "head_dim set apart": dict(model_type="llama", head_dim=80),
    "part of a head": dict(model_type="stablelm", partial_rotary_factor=0.25),
    "linear": dict(model_type="llama", rope_scaling=dict(type="linear", factor=3.0)),
    "dynamic": dict(model_type="llama", rope_scaling=dict(type="dynamic", factor=3.0)),
    "llama3": dict(
        model_type="llama",
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "yarn": dict(
        model_type="qwen2", rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "yarn, every setting": dict(
        model_type="llama",
        rope_scaling=dict(
            type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=20, beta_slow=2, truncate=False,
            mscale=0.8, mscale_all_dim=0.5,
        ),
    ),
    "yarn, scaling given": dict(
        model_type="llama",
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.25),
    ),
    "yarn, no factor": dict(
        model_type="llama", rope_scaling=dict(type="yarn", factor=None, original_max_position_embeddings=64)
    ),
    "longrope": dict(
        model_type="phi3", rope_scaling=dict(type="longrope", **FACTORS), original_max_position_embeddings=64
    ),
    "longrope, scaling given": dict(
        model_type="phi3", original_max_position_embeddings=64,
        rope_scaling=dict(type="longrope", attention_factor=1.1, **FACTORS),
    ),
}  # fmt: skip
MODULES = {
    "llama": transformers.models.llama.modeling_llama.LlamaRotaryEmbedding,
    "qwen2": transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding,
    "phi3": transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding,
    "stablelm": transformers.models.stablelm.modeling_stablelm.StableLmRotaryEmbedding,
}


def both(name: str) -> tuple[DecoderConfig, Any]:
    """Our config and transformers' module for it."""
    given = SIZES | ROPES[name]
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(given)))
    return DecoderConfig.from_huggingface(given), MODULES[given["model_type"]](theirs)


def assert_as_close_as_the_base(ours: Tensor, theirs: Tensor, positions: Tensor, frequencies: Tensor) -> None:
    """Ours has the base from float64; in float32 it is off by up to 6 eps here, of which 3 are factor * length / trained,
    rounded, before 2 is taken from it. Pow, reciprocal and product may each round the other way: 9 eps of an angle."""
    angles = positions[:, None] * torch.cat((frequencies, frequencies))
    assert ((ours - theirs).abs() <= torch.finfo(torch.float32).eps * (1 + 9 * angles)).all()


def rows(table: RotaryTable, lengths: list[int], at: list[int]) -> tuple[Tensor, Tensor]:
    return table.rows(torch.tensor(at), torch.tensor(lengths))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [20, 64, 65, 256, 257, 1000])
def test_rows_are_transformers(name, length):
    """A prompt of `length` tokens, from positions within the trained length to four times it."""
    config, module = both(name)
    positions = torch.arange(length)
    expected = module(torch.zeros(1), positions[None])
    actual = RotaryTable(config).rows(positions, torch.full_like(positions, length))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == (length, config.rotary_dim)
        if name == "dynamic" and length > config.max_positions:
            assert_as_close_as_the_base(ours, theirs[0], positions, module.inv_freq)
        else:
            assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize("name", [name for name in ROPES if "rope_scaling" in ROPES[name]])
@pytest.mark.parametrize("length", [None, 64, 65, 300, 1000])
def test_frequencies_are_transformers(name, length):
    config, module = both(name)
    expected, scaling = ROPE_INIT_FUNCTIONS[config.rope.rope_type](module.config, torch.device("cpu"), seq_len=length)
    frequencies, ours = inverse_frequencies(config.rope, config.rotary_dim, config.max_positions, length)
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, expected) and ours == scaling


@pytest.mark.parametrize("name", ROPES)
def test_a_default_device_changes_no_table(name):
    config, _ = both(name)
    expected = rows(RotaryTable(config, "cpu"), [300, 12], [299, 5])
    with torch.device("meta"):
        table = RotaryTable(config, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(rows(table, [300, 12], [299, 5]), expected, strict=True))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_row_depends_on_its_own_sequence_alone(name):
    """Rows of long and short sequences side by side are those that each gets alone, to the bit."""
    table = RotaryTable(both(name)[0])
    lengths, at = [700, 12, 300, 0, *range(250, 270)], [699, 11, 5, 0, *range(20)]  # the fourth row is padding
    together = rows(table, lengths, at)
    for i in range(len(at)):
        alone = rows(table, lengths[i : i + 1], at[i : i + 1])
        assert all(torch.equal(a[i], b[0]) for a, b in zip(together, alone, strict=True))
    assert all(x.isfinite().all() for x in together)
    assert not torch.equal(rows(table, [700], [5])[0], rows(table, [12], [5])[0])  # length does matter here


def test_dynamic_follows_transformers_from_token_to_token():
    """Decoding past the trained length: each step has the base of the length reached."""
    config, module = both("dynamic")
    table = RotaryTable(config)
    for length in (250, 256, 257, 258, 300):
        at = torch.tensor([length - 1])
        expected = module(torch.zeros(1), at[None])
        for ours, theirs in zip(rows(table, [length], [length - 1]), expected, strict=True):
            assert_as_close_as_the_base(ours, theirs[0], at, module.inv_freq)


def test_the_length_after_which_cached_keys_are_wrong():
    assert RotaryTable(both("longrope")[0]).recompute_after == 64
    assert RotaryTable(both("dynamic")[0]).recompute_after is None


@pytest.mark.parametrize("name", ["default", "dynamic", "longrope"])
def test_rows_read_nothing_back_to_the_host(name):
    """Tensors without values stand for a graph's capture: whatever asked one for its value would fail."""
    config = both(name)[0]
    cos, sin = RotaryTable(config, "meta").rows(*(torch.zeros(3, dtype=torch.int64, device="meta") for _ in range(2)))
    assert cos.shape == sin.shape == (3, config.rotary_dim) and cos.device.type == "meta"
