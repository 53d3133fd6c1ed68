"""A fused model is still the model: copied, saved, moved, compiled, hooked, checkpointed, adapted, shared, restored."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llama_fast
from llama_fast import ops
from tests.fusion.models import (
    SIZES,
    assert_within_rule,
    generate,
    gradients_in_float64,
    logits,
    loss_and_gradients,
    make,
    random_ids,
)
from tests.parity import not_interpreted

pytestmark = not_interpreted


@pytest.fixture
def ids(device):
    return random_ids(device=device)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_can_be_unfused(way, ids, device):
    model = make(device=device)
    plain = logits(model, ids)
    llama_fast.fuse(model)
    fused = logits(model, ids)
    if way == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, ids), fused)
    llama_fast.unfuse(twin)
    assert type(twin) is LlamaForCausalLM
    assert torch.equal(logits(twin, ids), plain)
    assert torch.equal(logits(model, ids), fused), "the model that was copied must stay fused"


def test_saved_models_keep_no_trace(ids, device, tmp_path):
    model = make(device=device)
    plain, keys, text = logits(model, ids), list(model.state_dict()), repr(model)
    classes = [str(type(module)) for module in model.modules()]
    llama_fast.fuse(model, mode="training")
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert [str(type(module)) for module in model.modules()] == classes, "they are looked up by name"
    model.save_pretrained(tmp_path)
    assert "llama_fast" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(device).eval()
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded, ids), plain)


def test_other_models_and_classes_are_untouched(ids, device):
    """Not even a model that shares the config."""
    config = LlamaConfig(**SIZES)
    one, other = (LlamaForCausalLM(config).to(device).eval() for _ in range(2))
    before, forwards = logits(other, ids), {type(module): type(module).forward for module in one.modules()}
    llama_fast.fuse(one, mode="training")
    assert config._attn_implementation == "sdpa"
    assert torch.equal(logits(other, ids), before)
    assert all(kind.forward is forward for kind, forward in forwards.items())
    one.config.use_cache = False
    llama_fast.unfuse(one)
    assert one.config is config
    assert config.use_cache is False, "what was set while the model was fused must be kept"


def test_the_random_state_is_untouched(device):
    model = make(device=device)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    llama_fast.fuse(model, mode="training")
    assert torch.equal(torch.rand(3), expected)


def test_another_default_device(device):
    model = make(device=device)
    with torch.device("meta"):
        report = llama_fast.fuse(model, mode="training")
    assert not report.left, str(report)


def test_parameters_may_change(ids, device):
    """Other values, dtypes, frozen ones, other parameters and other modules: nothing of them was stored."""
    plain, fused = make(device=device), make(device=device)
    llama_fast.fuse(fused, mode="training")
    for model in (plain, fused):
        layer = model.model.layers[0]
        layer.mlp.down_proj = nn.Linear(112, 64, bias=False, device=device)
        layer.mlp.down_proj.weight = nn.Parameter(torch.ones(64, 112, device=device) / 112)
        layer.input_layernorm.weight.requires_grad_(False)
        model.model.norm.variance_epsilon = 0.1
    torch.testing.assert_close(logits(fused, ids), logits(plain, ids))
    assert set(loss_and_gradients(fused, ids)) == set(loss_and_gradients(plain, ids))
    fused.to(torch.bfloat16)
    assert logits(fused, ids).dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradient_checkpointing(family, use_reentrant, ids, device):
    plain, fused = make(family, device), make(family, device)
    llama_fast.fuse(fused, mode="training")
    expected = loss_and_gradients(fused, ids)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    calls = []
    for model in (plain, fused):
        model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
    fused.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    found = loss_and_gradients(fused, ids)
    assert len(calls) == 2, "the layer must run again in the backward pass"
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert fused.is_gradient_checkpointing


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_lora(targets, when, ids, device):
    def adapted(model):
        torch.manual_seed(2)
        settings = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, settings).to(device)

    plain, fused = adapted(make(device=device)), make(device=device)
    if when == "before fuse":
        fused = adapted(fused)
        report = llama_fast.fuse(fused, mode="training")
    else:
        report = llama_fast.fuse(fused, mode="training")
        fused = adapted(fused)
    assert not report.left, str(report)

    ours, theirs, exact = (
        f(m, ids)
        for f, m in zip((loss_and_gradients,) * 2 + (gradients_in_float64,), (fused, plain, plain), strict=True)
    )
    assert set(ours) == set(theirs)
    assert all("lora" in name for name in ours if name != "loss")
    for name in exact:
        assert_within_rule(name, ours[name], theirs[name], exact[name], gradient=True)
    plain.eval(), fused.eval()
    assert torch.equal(generate(fused, ids), generate(plain, ids))
    adapted_logits = logits(fused, ids)
    torch.testing.assert_close(adapted_logits, logits(plain, ids))
    fused.merge_adapter()
    torch.testing.assert_close(logits(fused, ids), adapted_logits, rtol=1e-4, atol=1e-4)
    fused.unmerge_adapter()
    merged = fused.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), adapted_logits, rtol=1e-4, atol=1e-4)
    llama_fast.unfuse(merged)
    assert type(merged) is LlamaForCausalLM
    assert merged.config._attn_implementation == "sdpa"


WATCHED = ["self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj", "input_layernorm", "post_attention_layernorm", ""]


@pytest.mark.parametrize("name", WATCHED)
def test_hooks_see_what_they_saw(name, ids, device):
    seen = []

    def note(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    model = make(device=device)
    model.get_submodule(f"model.layers.0.{name}".rstrip(".")).register_forward_hook(note)
    logits(model, ids)
    llama_fast.fuse(model)
    assert len(seen) == 1, "hooks must not fire while layers are checked"
    logits(model, ids)
    torch.testing.assert_close(*seen)


def count_residuals(monkeypatch):
    """Counts where residuals are added: {"linear": ..., "rms_norm": ...}."""
    counts = dict(linear=0, rms_norm=0)

    def counting(name, op):
        def counted(*args, residual=None, **kwargs):
            counts[name] += residual is not None
            return op(*args, residual=residual, **kwargs)

        return counted

    for name in counts:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counts


def test_where_residuals_are_added(ids, device, monkeypatch):
    model = make(device=device)
    llama_fast.fuse(model, verify=False)
    counts = count_residuals(monkeypatch)
    logits(model, ids)
    assert counts == dict(linear=4, rms_norm=0)
    for layer in model.model.layers:  # a projection that is watched, and one that is no plain nn.Linear
        layer.self_attn.o_proj.register_forward_hook(lambda *_: None)
    logits(model, ids)
    assert counts == dict(linear=6, rms_norm=2)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autocast(family, watched, ids, device):
    """The same dtypes as before, and no further from float64: residual sums stay in float32, wherever they are formed."""
    plain, fused = make(family, device), make(family, device)
    llama_fast.fuse(fused, mode="training")
    if watched:
        fused.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)
    with torch.autocast(device.type, torch.bfloat16):
        ours, theirs = logits(fused, ids), logits(plain, ids)
        fused.train()
        fused(input_ids=ids, labels=ids).loss.backward()
    exact = logits(make(family, device), ids)
    assert ours.dtype == theirs.dtype
    assert_within_rule("logits", ours, theirs, exact)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiles_whole(family, ids, device):
    model = make(family, device, num_hidden_layers=1)
    llama_fast.fuse(model, mode="training")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids))
    ours, theirs = (logits(m, ids, attention_mask=mask)[mask.bool()] for m in (compiled, model))
    torch.testing.assert_close(ours, theirs)
    expected = loss_and_gradients(model, ids)["loss"]
    torch.testing.assert_close(loss_and_gradients(compiled, ids)["loss"], expected)


def test_logits_are_there_where_they_are_wanted(ids, device):
    model = make(device=device)
    llama_fast.fuse(model, mode="training")
    assert model(ids, labels=ids).logits is not None
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids).logits is not None
    assert model(ids, labels=ids, logits_to_keep=ids.shape[1]).logits is not None
    loss, *rest = model(ids, labels=ids, return_dict=False)
    assert loss.ndim == 0
    assert not any(isinstance(part, torch.Tensor) for part in rest)


@pytest.mark.parametrize("extra", [{}, "num_items", "shift_labels", "ignore_index"])
def test_the_loss_is_transformers_loss(extra, ids, device):
    labels = ids.clone()
    labels[0, 3:7] = -100
    more = {
        "num_items": dict(num_items_in_batch=torch.tensor(37, device=device)),
        "shift_labels": dict(shift_labels=labels.roll(1, 1)),
        "ignore_index": dict(ignore_index=int(ids[0, 1])),
    }.get(extra or "", {})
    model = make(device=device).train()
    expected = model(ids, labels=labels if extra != "ignore_index" else ids, **more).loss
    llama_fast.fuse(model, mode="training")
    loss = model(ids, labels=labels if extra != "ignore_index" else ids, **more).loss
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected)


def test_a_loss_of_ones_own_is_used(ids, device):
    model = make(device=device).train()
    llama_fast.fuse(model, mode="training")
    model.loss_function = lambda logits, **_: logits.sum() * 0.0 + 7.0
    assert model(ids, labels=ids).loss == 7.0


def test_fuse_twice_and_unfuse_twice(device):
    model = make(device=device)
    llama_fast.fuse(model)
    with pytest.raises(ValueError, match="model is fused already: call llama_fast"):
        llama_fast.fuse(model)
    llama_fast.unfuse(model)
    with pytest.raises(ValueError, match="model is not fused"):
        llama_fast.unfuse(model)


def test_a_class_made_by_others_is_not_undone():
    """FSDP2 gives a module a subclass of its class: to set the old one would silently take the sharding away."""
    model = make()
    llama_fast.fuse(model)
    layer = model.model.layers[0]
    layer.__class__ = type("FSDPLlamaDecoderLayer", (type(layer),), {})
    with pytest.raises(ValueError, match="a fused layer is a FSDPLlamaDecoderLayer now"):
        llama_fast.unfuse(model)
    assert model.config._attn_implementation == "llama_fast"


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        llama_fast.fuse("llama")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
        llama_fast.unfuse(3)
    with pytest.raises(ValueError, match="mode must be 'inference' or 'training', got 'fast'"):
        llama_fast.fuse(make(), mode="fast")


def test_layers_that_others_run_are_left(device):
    """accelerate replaces `forward` on the instance."""
    model = make(device=device)
    add_hook_to_module(model.model.layers[0].mlp.down_proj, ModelHook())
    report = llama_fast.fuse(model)
    reasons = {left.name: left.reason for left in report.left}
    assert reasons["model.layers.0.mlp"] == "its down_proj is dispatched or offloaded by accelerate"
    assert report.count("mlp") == 1
    assert report.count("residual") == 1


def test_a_missing_transformers_is_named():
    code = "import sys; sys.modules['transformers'] = None; import llama_fast; llama_fast.fuse"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'llama_fast.fuse needs transformers: pip install "llama-fast[transformers]"' in run.stderr


def test_importing_the_package_imports_no_transformers():
    code = "import sys, llama_fast; assert not {'torch', 'transformers'} & set(sys.modules); llama_fast.__version__"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
