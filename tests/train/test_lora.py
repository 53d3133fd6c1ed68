"""Adapters: only they are learnt, PEFT reads them and ours reads PEFT's, and merged they compute the same."""

import json

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_fast.train import checkpoints, lora
from llama_fast.train.config import LoraConfig
from llama_fast.train.export import export
from llama_fast.train.loop import train
from llama_fast.train.model import Packed
from llama_fast.train.start import model_of
from tests.parity import not_interpreted
from tests.train.test_loop import numbers, quiet, same
from tests.train.test_model import loaded, tokens

pytestmark = not_interpreted

IDS = tokens(40)


def logits(model):
    with torch.no_grad():
        return model.logits(Packed.of(IDS, [len(IDS)]))


@pytest.fixture
def base(corpus, tmp_path):
    """A folder of a model with the corpus's vocabulary."""
    torch.manual_seed(3)
    sizes = dict(vocab_size=272, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tuned(config, base):
    """Makes a config that tunes `base`: `tuned("lora.rank=2", ...)`."""
    return lambda *settings, **names: config(
        f"model={{path = '{base}'}}", "lora={rank = 4, alpha = 8.0}", "optimizer.lr=0.01", *settings, **names
    )


def test_only_adapters_are_learnt_and_kept(tuned, base):
    made, said = tuned("lora.targets=['q_proj', 'mlp.down_proj']"), []
    train(made, show=said.append)
    assert f" parameters, {2 * 4 * (64 + 64 + 112 + 64):,} of them trained;" in said[0]
    assert said[1].startswith("at least ") and said[2].startswith("memory ") and said[3].startswith("step 0: ")
    folder = checkpoints.folders(made.run.out)[6]
    names = checkpoints.FileSystemReader(folder).read_metadata().state_dict_metadata
    layer = "model.model.layers.0.self_attn.q_proj"
    assert {name for name in names if name.startswith(layer)} == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
    assert not any("embed" in name for name in names)
    model, _ = model_of(made.run.out, folder)
    theirs = AutoModelForCausalLM.from_pretrained(base).state_dict()
    frozen = {name: each for name, each in model.named_parameters() if not each.requires_grad}
    assert all(torch.equal(each, theirs[name]) for name, each in frozen.items()) and len(frozen) == len(theirs) - 1


def test_a_run_with_dropout_goes_on_to_the_same_bits(tuned):
    settings = (
        "lora.dropout=0.2",
        "model.dropout=0.1",
        "run.recompute=full",
        "run.dtype=bfloat16",
        "run.weights=bfloat16",
    )
    whole, parts = tuned(*settings, out="whole"), tuned(*settings, out="parts")
    train(whole, show=quiet)

    def stop(line):
        if line.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, show=stop)
    train(parts, show=quiet)
    assert numbers(parts) == numbers(whole)
    ours, theirs = (model_of(each.run.out, checkpoints.folders(each.run.out)[6])[0] for each in (whole, parts))
    assert same(ours.learnt(), theirs.learnt())
    assert ours.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in ours.learnt().values())


def test_peft_reads_ours_and_merging_changes_nothing(tuned, base, tmp_path):
    made = tuned("schedule.steps=3")
    train(made, show=quiet)
    export(made.run.out, tmp_path / "adapter", adapter=True)
    export(made.run.out, tmp_path / "merged")
    ours, _ = model_of(made.run.out, checkpoints.folders(made.run.out)[3])
    expected = logits(ours)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (plain(IDS[None]).logits[0] - expected).abs().max() > 1e-3  # it has learnt something
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (adapted, merged):
        torch.testing.assert_close(model(IDS[None]).logits[0], expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    again = trained_on(base, LoraConfig(path=str(tmp_path / "adapter")))
    assert same(again.learnt(), ours.learnt())


def trained_on(base, config):
    model = loaded(base)
    lora.add(model, config)
    lora.fill(model, config, seed=0)
    return model


@pytest.mark.parametrize(
    "targets", [["q_proj", "up_proj"], r".*\.1\.self_attn\.[vo]_proj", "all-linear"], ids=["names", "pattern", "all"]
)
def test_ours_reads_pefts(base, tmp_path, targets):
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False),
    )
    theirs.save_pretrained(tmp_path / "peft")
    ours = trained_on(base, LoraConfig(path=str(tmp_path / "peft")))
    expected = theirs.eval()(IDS[None]).logits[0]
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    stored = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in ours.learnt()} == set(stored)


def test_gradients_and_starting_weights_are_pefts(base):
    """A is drawn from the same interval, B is zero; from the same weights come the same gradients."""
    ours = trained_on(base, LoraConfig(rank=4, alpha=8, targets=("v_proj", "down_proj")))
    learnt = ours.learnt()
    (name, a), *_ = learnt.items()
    assert a.abs().max() <= 64**-0.5 and a.std().item() == pytest.approx((64 * 3) ** -0.5, rel=0.1)
    assert all((each == 0).all() for name, each in learnt.items() if "lora_B" in name)
    for each in learnt.values():
        each.copy_(torch.randn_like(each) * 0.1)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    pairs = {f"base_model.model.{name}".replace(".weight", ".default.weight"): each for name, each in learnt.items()}
    assert theirs.load_state_dict(pairs, strict=False).unexpected_keys == []
    ours(Packed.of(IDS, [40]), IDS.roll(-1)).backward()
    logits = theirs(IDS[None]).logits[0]
    torch.nn.functional.cross_entropy(logits, IDS.roll(-1), reduction="sum").backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = theirs.get_parameter(f"base_model.model.{name}".replace(".weight", ".default.weight"))
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "only plain LoRA is read, without biases, and this has use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "and this has init_lora_weights='pissa_niter_4'"),
        ({"alora_invocation_tokens": [1]}, "and this has alora_invocation_tokens"),
        ({"peft_type": "IA3"}, "this has bias='none', peft_type='IA3'"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"does not fit the model: model.layers.0.self_attn.k_proj.lora_A.weight"),
        ({"r": 4}, r"does not fit the model: .* \(3, 64\), expected \(4, 64\)"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path, change, message):
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        trained_on(base, LoraConfig(path=str(tmp_path / "peft")))


@pytest.mark.parametrize("text", ["{", '{"peft_type": "LORA"}'])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config.json is no adapter's config: "):
        lora.read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.targets=['q_proj', 'lm_head']"], "'lm_head' is no product of a layer; there are q_proj, k_proj"),
        (["lora.targets=[]"], "targets must name a product"),
        (["lora.path='x'"], "leave out path, or rank, alpha"),
        (["lora={path='nowhere'}"], "nowhere holds no adapter: it has no adapter_config.json"),
        (["lora.dropout=1.0"], "dropout must be from 0 to below 1"),
        (["run.weights=bfloat16"], "for layers that compute in it: give dtype, too"),
    ],
)
def test_wrong_settings_are_named(tuned, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tuned(*settings), show=quiet)


def test_adapters_need_a_model_and_the_same_one(config, tuned, base, tmp_path):
    with pytest.raises(ValueError, match=r"lora is for a model that has learnt already: give model.path"):
        config("lora={}")
    made = tuned("schedule.steps=1")
    train(made, show=quiet)
    path = base / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: each + 1 for name, each in weights.items()}, path, metadata={"format": "pt"})
    for use in (train, lambda made: export(made.run.out, tmp_path / "merged")):
        with pytest.raises(ValueError, match=r"was trained with another model.path"):
            use(made)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.rank=8", r"q_proj.lora_A.weight is \(4, 64\) torch.float32 there and \(8, 64\) torch.float32 here"),
        (
            "lora.targets=['q_proj']",
            "holds other tensors: one of the two has .* undo the change of optimizer.kind, lora",
        ),
    ],
)
def test_other_adapters_do_not_go_on(tuned, setting, message):
    """A checkpoint that does not fit is not called damaged."""
    train(tuned("schedule.steps=1"), show=quiet)
    with pytest.raises(ValueError, match=message):
        train(tuned(setting), show=quiet)


def test_rows_of_another_length_do_not_go_on(tuned):
    """The cursor counts rows."""
    train(tuned("schedule.steps=1"), show=quiet)
    with pytest.raises(ValueError, match=r"was trained with another batch.sequence_length"):
        train(tuned("batch.sequence_length=40"), show=quiet)


def test_a_run_without_adapters_has_none_to_export(config, tmp_path):
    made = config("schedule.steps=1")
    train(made, show=quiet)
    with pytest.raises(ValueError, match=r"has no adapter: it was trained without \[lora\]"):
        export(made.run.out, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()
