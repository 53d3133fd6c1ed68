"""Models in GGUF files against transformers' models that they were written from."""

import math
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from llama_fast import LLM, SamplingParams
from llama_fast.cli.main import app
from llama_fast.decoder import checkpoint
from llama_fast.decoder.config import DecoderConfig
from llama_fast.fusion.verify import InFloat64
from llama_fast.kernels.parity import error_bound, relative_error
from tests.decoder.gguf.files import KINDS, write_model
from tests.parity import not_interpreted

pytestmark = not_interpreted

# columns that are whole blocks of every type
SIZES: dict[str, Any] = dict(
    vocab_size=600, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=2,
    pad_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
SMALL = dict(hidden_size=64, intermediate_size=96)


def make(architecture="llama", **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **(SIZES | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_type_of_tensor(architecture, kind, tmp_path):
    """The same numbers as a checkpoint of transformers with what the type leaves of the weights."""
    model = make(architecture)
    write_model(tmp_path / "a.gguf", model, kind)
    model.save_pretrained(tmp_path / "folder")
    ours, theirs = (
        checkpoint.load(place, device="cpu", dtype=torch.float32)
        for place in (tmp_path / "a.gguf", tmp_path / "folder")
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name


ROPE = dict(rope_theta=500000.0)
LLAMA3 = ROPE | dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def llama3_factors(head_dim=16, base=500000.0, factor=32.0):
    """As llama.cpp's converter computes them."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors).numpy()


SCALING = {".rope.scaling.factor": 4.0}
VARIANTS = {
    "plain": ("llama", {}, {}),
    "tied": ("llama", dict(tie_word_embeddings=True), {}),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True), {}),
    "head_dim apart": ("llama", dict(head_dim=32), {".attention.key_length": 32, ".attention.value_length": 32}),
    "one key head": ("llama", dict(num_key_value_heads=1), {}),
    "as many key heads": ("llama", dict(num_key_value_heads=4), {".attention.head_count_kv": None}),
    "base": ("llama", dict(rope_parameters=ROPE), {}),
    "linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0)), SCALING),
    "linear, said": (
        "llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0)), SCALING | {".rope.scaling.type": "linear"}
    ),
    "linear, as it was called": (
        "llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0)), {".rope.scale_linear": 4.0}
    ),
    "none": ("llama", {}, SCALING | {".rope.scaling.type": "none"}),
    "llama3": ("llama", dict(rope_parameters=LLAMA3), {"rope_freqs": llama3_factors()}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, tied, yarn": (
        "qwen2",
        dict(
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=24.0),
        ),
        SCALING | {
            ".rope.scaling.type": "yarn", ".rope.scaling.original_context_length": 32, ".rope.scaling.yarn_beta_fast": 24.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_and_logits(variant, tmp_path):
    architecture, settings, more = VARIANTS[variant]
    model = make(architecture, **(SMALL | settings))
    write_model(tmp_path / "a.gguf", model, **more)
    llm = LLM(tmp_path / "a.gguf", dtype="float32", device="cpu", progress=False)
    assert llm.config == DecoderConfig.from_huggingface(model.config.to_dict())
    ids = torch.randint(0, 600, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(ids).logits[0]
        with InFloat64():
            exact = model.double()(ids).logits[0]
    assert relative_error(llm.logits(ids[0]), exact) <= error_bound(relative_error(theirs, exact), torch.float32)


def test_transformers_reads_the_same_from_the_file(tmp_path):
    """So the files that these tests write are like those that others read."""
    for architecture in ("llama", "qwen2"):
        path = tmp_path / f"{architecture}.gguf"
        write_model(path, make(architecture), "Q8_0")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
        ids = torch.arange(40) * 7
        with torch.no_grad():
            theirs = model.eval()(ids[None]).logits[0]
        ours = LLM(path, dtype="float32", device="cpu", progress=False).logits(ids)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("Q4_0", torch.bfloat16)])
def test_its_own_dtype(kind, dtype, tmp_path):
    write_model(tmp_path / "a.gguf", make(), kind)
    opened = checkpoint.open_checkpoint(tmp_path / "a.gguf")
    assert opened.dtype == dtype
    assert checkpoint.load(tmp_path / "a.gguf", device="cpu").embedding.weight.dtype == dtype


def test_it_is_saved_in_hugging_face_format(tmp_path):
    write_model(tmp_path / "a.gguf", make(rope_parameters=LLAMA3), "Q4_1", rope_freqs=llama3_factors(64))
    decoder = checkpoint.load(tmp_path / "a.gguf", device="cpu", dtype=torch.float32)
    checkpoint.save(decoder, tmp_path / "folder")
    again = checkpoint.load(tmp_path / "folder", device="cpu")
    assert again.config == decoder.config
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in decoder.named_parameters())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({".expert_count": 8}, r"keys that are not supported: llama\.expert_count \(8\)"),
        ({".attention.sliding_window": 64}, r"llama\.attention\.sliding_window \(64\)"),
        ({".attention.head_count_kv": [2, 1]}, r"llama\.attention\.head_count_kv \(\[2, 1\]\)"),
        ({".block_count": None, ".context_length": None}, r"has no llama\.block_count, llama\.context_length"),
        ({".rope.dimension_count": 8}, r"llama\.rope\.dimension_count must be 16, as a key has, got 8"),
        ({".attention.value_length": 32}, r"llama\.attention\.value_length must be 16"),
        ({".rope.scaling.type": "longrope"}, r"rope\.scaling\.type must be none, linear or yarn, got 'longrope'"),
        ({"rope_freqs": llama3_factors() * 1.5}, r"rope_freqs\.weight does not hold the factors of a Llama 3"),
        ({"rope_freqs": llama3_factors(8)}, r"rope_freqs\.weight does not hold the factors of a Llama 3"),
        ({".block_count": 3}, r"9 missing: blk\.2\.attn_norm\.weight"),
        ({".block_count": 1}, r"9 not known: blk\.1\."),
        ({".feed_forward_length": 64}, r"of another shape: blk\.0\.ffn_gate\.weight \(96, 64\), expected \(64, 64\)"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(more, message, tmp_path):
    write_model(tmp_path / "a.gguf", make(**SMALL), **more)
    with pytest.raises(ValueError, match=message):
        checkpoint.open_checkpoint(tmp_path / "a.gguf")


def test_another_architecture(tmp_path):
    write_model(tmp_path / "a.gguf", make("qwen3", head_dim=16, **SMALL))
    with pytest.raises(ValueError, match=r"general\.architecture must be one of llama, qwen2, got 'qwen3'"):
        LLM(tmp_path / "a.gguf")


def test_a_vocabulary_alone_is_no_model(tmp_path):
    from tests.decoder.gguf.files import write_vocabulary

    with pytest.raises(ValueError, match=r"has no token_embd\.weight: it holds no whole model"):
        LLM(write_vocabulary(tmp_path / "a.gguf", "qwen2"))


def test_how_a_file_is_found(tmp_path):
    write_model(tmp_path / "a.gguf", make(**SMALL))
    assert checkpoint.find(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    with pytest.raises(ValueError, match=r"give the file itself: .*a\.gguf"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file .*b\.gguf"):
        LLM(tmp_path / "b.gguf")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a\.txt is a file: give the folder of the model, or a \.gguf file"):
        LLM(tmp_path / "a.txt")


def test_on_the_command_line(tmp_path):
    path = tmp_path / "a.gguf"
    write_model(path, make(**SMALL), "Q4_0")
    arguments = ["-p", "hello the 123", "--temperature", "0", "--max-tokens", "6", "--dtype", "float32"]
    result = CliRunner().invoke(app, ["generate", str(path), *arguments])
    assert result.exit_code == 0, result.output
    llm = LLM(path, dtype="float32", progress=False)
    assert (
        result.stdout
        == "hello the 123" + llm.generate("hello the 123", SamplingParams(temperature=0, max_tokens=6))[0].text + "\n"
    )
    path.write_bytes(path.read_bytes()[:-100])
    result = CliRunner().invoke(app, ["generate", str(path), *arguments])
    assert result.exit_code == 2 and "is not a whole GGUF file" in " ".join(result.output.split())
