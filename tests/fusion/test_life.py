"""A fused model is still the model: copied, saved, moved, compiled, hooked, checkpointed, adapted, shared, restored."""

import copy
import io
import multiprocessing
import operator
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llama_fast
from llama_fast import ops
from llama_fast.fusion.swap import restore
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
from tests.parity import CalledOps, not_interpreted

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


LOAD = """
import sys, torch
model, ids, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected)
assert model.config._attn_implementation == "llama_fast"
"""


def test_a_pickled_model_runs_in_another_process(ids, device, tmp_path):
    """Which never calls `fuse`: its attention is looked up by name there, and need not stand beside a layer of ours."""
    model = make(device=device)
    llama_fast.fuse(model)
    for module in model.modules():
        restore(module)
    torch.save((model, ids, logits(model, ids)), tmp_path / "model.pt")
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "model.pt"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_model_is_sent_to_a_spawned_process(ids):
    model, ids = make().requires_grad_(False), ids.cpu()
    llama_fast.fuse(model, mode="training")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(operator.call, (model, ids)).logits, model(ids).logits)


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


def test_an_attention_chosen_while_fused_is_kept(ids, device):
    model = make(device=device)
    llama_fast.fuse(model)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    del model.config.pad_token_id
    assert len(model(ids).attentions) == 2
    llama_fast.unfuse(model)
    assert model.config._attn_implementation == "eager"
    assert "pad_token_id" not in vars(model.config)
    assert len(model(ids).attentions) == 2


def prepared(model):
    """As `Trainer(bf16=True)` does it: autocast around a forward that it keeps."""
    return Accelerator(mixed_precision="bf16", cpu=model.device.type == "cpu").prepare(model)


def compiled(model):
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def with_compiled_layers(model):
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    return model


def hooked(model):
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


def kept(model):
    for module in model.modules():
        module.forward = module.forward
    return model


@pytest.fixture
def fresh_compiler():
    """Compiled code is kept by the code it was made from, which tests share: only so many versions of it."""
    yield
    torch.compiler.reset()


@pytest.fixture
def fresh_accelerate():
    """Its state is the process's, and refuses another precision than the first: lm-eval's own model sets one too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_compiler", "fresh_accelerate")
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("keep", [prepared, compiled, with_compiled_layers, hooked, kept])
def test_unfuse_after_others_kept_a_forward(keep, mode, ids, device):
    """Of the model or of layers in it: what they kept runs the layer's own, as if it had never been fused."""
    expected = keep(make(device=device))
    model = make(device=device)
    llama_fast.fuse(model, mode=mode)
    model = keep(model)
    with CalledOps() as ran:
        logits(model, ids)
    assert {"llama_fast.rms_norm.default", "llama_fast.glu.default", "llama_fast.rope.default"} <= set(ran)
    llama_fast.unfuse(model)
    with CalledOps() as ran:
        assert torch.equal(logits(model, ids), logits(expected, ids))
        assert set(loss_and_gradients(model, ids)) == set(loss_and_gradients(expected, ids))
        assert model(ids, labels=ids).logits is not None
    assert not [name for name in ran if name.startswith("llama_fast")]


def test_a_forward_in_a_variable_outlives_unfuse(ids, device):
    model = make(device=device)
    expected = logits(model, ids)
    llama_fast.fuse(model, mode="training")
    forward, norm = model.forward, model.model.norm.forward
    llama_fast.unfuse(model)
    with torch.no_grad():
        assert torch.equal(forward(ids).logits, expected)
        assert norm(torch.ones(1, 64, device=device)).shape == (1, 64)


def test_a_forward_of_ones_own_is_called_the_usual_way(ids, device):
    """Without the residual that only fused layers know."""
    plain, fused = make(device=device), make(device=device)
    llama_fast.fuse(fused)
    for model in (plain, fused):
        for layer in model.model.layers:
            forward = layer.mlp.forward
            layer.mlp.forward = lambda x, forward=forward: 2.0 * forward(x)
    torch.testing.assert_close(logits(fused, ids), logits(plain, ids))


def test_the_random_state_is_untouched(device):
    model = make(device=device)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    llama_fast.fuse(model, mode="training")
    assert torch.equal(torch.rand(3), expected)


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


class Softer(nn.SiLU):
    def forward(self, x):
        return super().forward(0.5 * x)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("activation", [nn.GELU(), Softer(), torch.tanh])
def test_another_activation_is_honoured(activation, watched, ids, device):
    plain, fused = make(device=device), make(device=device)
    llama_fast.fuse(fused)
    for model in (plain, fused):
        del model.model.layers[1].mlp.act_fn
        model.model.layers[1].mlp.act_fn = activation
        if watched:
            model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logits(fused, ids), logits(plain, ids))
    assert not torch.allclose(logits(fused, ids), logits(make(device=device), ids))


def test_another_form_of_the_gelu_is_honoured(device):
    """The same type: it differs by its form alone. A copy of the activation is no other."""
    mlp = make("gemma", device).model.layers[0].mlp
    mlp.act_fn = nn.GELU(approximate="tanh")
    x = torch.randn(4, 64, device=device)
    plain = copy.deepcopy(mlp)
    llama_fast.fuse(mlp)
    with CalledOps() as ran:
        torch.testing.assert_close(copy.deepcopy(mlp)(x), plain(x))
    assert "llama_fast.glu.default" in ran
    mlp.act_fn.approximate = plain.act_fn.approximate = "none"
    assert torch.equal(mlp(x), plain(x))


def test_dropout_that_is_switched_on_drops_out(ids, device):
    model = make("phi3", device)
    llama_fast.fuse(model, mode="training")
    expected = logits(model, ids)
    for layer in model.model.layers:
        layer.resid_mlp_dropout.p = 0.5
    assert torch.equal(logits(model, ids), expected)
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_embeddings_made_in_inference_mode(mode, ids, device):
    plain, fused = make(device=device), make(device=device)
    llama_fast.fuse(fused, mode=mode)
    with torch.inference_mode():
        embeddings = plain.get_input_embeddings()(ids)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
    for given in ({}, dict(attention_mask=mask)):
        ours, theirs = (model(inputs_embeds=embeddings, **given).logits for model in (fused, plain))
        counted = given.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(ours[counted], theirs[counted])
        ours[counted].sum().backward()


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


@pytest.mark.usefixtures("fresh_compiler")
def test_layers_compile_one_by_one(ids, device):
    """Of many kinds in one process, each with its own share of the compiler's limit."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        for family in ("llama", "gemma", "stablelm"):
            model = make(family, device)
            llama_fast.fuse(model, verify=False)
            expected = logits(model, ids)
            for layer in model.model.layers:
                for module in (layer.input_layernorm, layer.mlp):
                    module.forward = torch.compile(module.forward, backend="eager")
            torch.testing.assert_close(logits(model, ids), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.nightly)])
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
