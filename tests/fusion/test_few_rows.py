"""With few rows and no gradient a decoder layer is a few ops of many launches, and nothing else between them."""

import copy
from collections import Counter

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, Qwen2MoeConfig, Qwen2MoeForCausalLM, StaticCache

import llama_fast
from llama_fast.fusion.neighbours import CACHE_NAME, set_experts
from llama_fast.kernels import cpu
from tests.fusion.models import SIZES, assert_within_rule, generate, logits, logits_in_float64, make, random_ids
from tests.parity import CalledOps, not_interpreted

pytestmark = [
    not_interpreted,
    pytest.mark.skipif(
        not torch.cuda.is_available() and (cpu.chosen() == "pytorch" or not cpu.multiplies(torch.float32)),
        reason="there are no kernels of few rows on this CPU",
    ),
]
LAYER = dict(norm_heads=1, attention_decode=1, layer_tail=1)
PARTS = dict(norm_heads=1, attention_decode=1, linear=2, norm_swiglu=1)


@pytest.fixture
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.fixture
def ids(device):
    return random_ids(2, 4, device=device)


def fused(family="llama", device="cpu", **settings):
    model = make(family, device, **settings)
    report = llama_fast.fuse(model)
    assert not report.left, str(report)
    return model


def ran_in_layers(model, ids, **inputs):
    """The ops of ours in a pass, without the last norm, a layer's share of them."""
    with CalledOps() as names:
        logits(model, ids, **inputs)
    ours = Counter(name.split(".")[1] for name in names if name.startswith("llama_fast."))
    layers = len(model.get_decoder().layers)
    ours["layer_norm" if "layer_norm" in ours else "rms_norm"] -= 1
    assert not any(count % layers for count in ours.values())
    return {name: count // layers for name, count in ours.items() if count}


def step(model, ids, cache=None):
    """A single query behind the other ids: the ops of a layer."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits(model, ids[:, :-1], **{CACHE_NAME: cache})
    return ran_in_layers(model, ids[:, -1:], **{CACHE_NAME: cache})


FAMILIES = {
    "llama": LAYER,
    "mistral": LAYER,
    "qwen2": LAYER,
    "phi3": LAYER,
    "qwen3": dict(rms_norm=3, rope=1, attention_decode=1, linear=2, norm_swiglu=1),
    "gemma": dict(rms_norm=2, rope=1, attention_decode=1, linear=2, glu=1),
    "stablelm": dict(layer_norm=2, rope=1, attention_decode=1, linear=2, glu=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_ops_of_a_layer(family, dtype, ids, device):
    """Norms of heads, GeGLU, 1 + weight and LayerNorm are in no kernel that projects: what is, is used."""
    if device.type == "cpu" and not cpu.multiplies(dtype):
        pytest.skip("the CPU converts it")
    model = fused(family, device, dtype=dtype)
    assert step(model, ids) == FAMILIES[family]
    prompt = ran_in_layers(model, ids)
    expected = {"attention" if name == "attention_decode" else name: n for name, n in FAMILIES[family].items()}
    assert prompt == expected


def test_experts_stay_behind_grouped_attention(ids, device):
    """An MLP that was left is called as ever."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    set_experts(config, "eager")  # the others are not there in float64
    plain = Qwen2MoeForCausalLM(config).to(device).eval()
    model = copy.deepcopy(plain)
    assert llama_fast.fuse(model).count("residual") == 2
    ours, theirs = logits(model, ids), logits(plain, ids)
    assert_within_rule("logits", ours, theirs, logits_in_float64(plain, ids))
    with CalledOps() as names:
        logits(model, ids)
    assert sum("norm_heads" in name for name in names) == 2


def test_long_prompts_take_separate_ops(device):
    model = fused(device=device)
    assert ran_in_layers(model, random_ids(1, 16, device=device)) == dict(norm_heads=1, attention=1, layer_tail=1)
    # beside those that add a residual, on a CPU those of gate and up, which oneDNN multiplies faster than PyTorch
    linear = 2 if torch.device(device).type == "cuda" else 4
    separate = dict(rms_norm=2, rope=1, attention=1, linear=linear, glu=1)
    assert ran_in_layers(model, random_ids(1, 17, device=device)) == separate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_heads_on_a_cpu(dtype):
    """The last tokens of a prompt, few of them and more, and all; a head is called as ever, so hooks see it."""
    plain = make(dtype=dtype, vocab_size=2**15)
    model = copy.deepcopy(plain)
    report = llama_fast.fuse(model)
    assert report.count("head") == 1 and not report.left, str(report)
    assert llama_fast.fuse(make(dtype=dtype)).count("head") == 0
    ids = random_ids(2, 20)
    for given in (dict(logits_to_keep=1), dict(logits_to_keep=9), {}):
        exact = logits_in_float64(plain, ids, **given)
        assert_within_rule(str(given), logits(model, ids, **given), logits(plain, ids, **given), exact)
    with CalledOps() as names:
        logits(model, ids[:, :1])
    assert names.count("llama_fast.linear.alone") == 1
    assert torch.equal(generate(model, ids), generate(plain, ids)) or dtype == torch.bfloat16
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    logits(model, ids, logits_to_keep=1)
    assert seen == [(2, 1, 2**15)]
    llama_fast.unfuse(model)
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_gradients_take_separate_ops(ids, device):
    plain, model = make(device=device), fused(device=device)
    with CalledOps() as names:
        model(input_ids=ids, labels=ids).loss.backward()
    plain(input_ids=ids, labels=ids).loss.backward()
    assert not {"norm_heads", "norm_swiglu", "layer_tail"} & {name.split(".")[1] for name in names}
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_rows_and_lengths(family, kind, device):
    """Of one row and of several, with padding before one, pieces of a prompt and single queries."""
    plain, model = make(family, device), fused(family, device)
    settings = {} if kind is DynamicCache else dict(max_cache_len=16)
    for batch in (1, 3):
        ids = random_ids(batch, 12, device=device)
        mask = torch.ones_like(ids)
        mask[-1, : 2 if batch > 1 else 0] = 0

        def pieces(model, ids=ids, mask=mask):
            cache, end, out = kind(config=model.config, **settings), 0, []
            for piece in ids.split([5, 3, 2, 1, 1], dim=1):
                end += piece.shape[1]
                out.append(logits(model, piece, attention_mask=mask[:, :end], **{CACHE_NAME: cache}))
            return torch.cat(out, dim=1)[mask.bool()]

        exact = logits_in_float64(plain, ids, attention_mask=mask)[mask.bool()]
        assert_within_rule(f"logits of {batch} rows", pieces(model), pieces(plain), exact)


WATCHED = [
    "input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


@pytest.mark.parametrize("how", ["forward", "forward_pre", "accelerate"])
@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_a_part_sees_it(name, how, ids, device):
    model, seen = make(device=device), []
    part = model.get_submodule(f"model.layers.0.{name}")
    llama_fast.fuse(model, verify=False)
    expected = logits(model, ids)
    if how == "accelerate":

        class Watcher(ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                seen.append(module)
                return args, kwargs

        add_hook_to_module(part, Watcher())
    else:
        getattr(part, f"register_{how}_hook")(lambda module, *_: seen.append(module))
    torch.testing.assert_close(logits(model, ids), expected)
    assert seen == [part]
    seen.clear()
    generate(model, ids, max_new_tokens=2)
    assert seen == [part] * 2


def test_hooks_on_all_modules_see_all(ids, device):
    model, seen = fused(device=device), Counter()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.update([module]))
    try:
        logits(model, ids)
    finally:
        handle.remove()
    layer = model.model.layers[1]
    assert all(
        seen[part] for part in (layer.input_layernorm, layer.self_attn, layer.self_attn.q_proj, layer.mlp.up_proj)
    )


def test_parts_that_change_are_honoured(ids, device):
    """Weights in place and replaced, another norm weight dtype, a module put in the place of a projection, an activation."""
    model, twin = make(device=device), make(device=device)
    llama_fast.fuse(model)
    with torch.no_grad():
        for each in (model, twin):
            layer = each.model.layers[0]
            layer.self_attn.k_proj.weight.mul_(1.5)
            layer.self_attn.v_proj.weight = nn.Parameter(layer.self_attn.v_proj.weight.flip(0))
            layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data * 0.5
            layer.mlp.up_proj = copy.deepcopy(layer.mlp.up_proj)
            layer.input_layernorm.weight.add_(0.5)
            layer.input_layernorm.variance_epsilon = 1e-3
    assert ran_in_layers(model, ids) == dict(norm_heads=1, attention=1, layer_tail=1)
    torch.testing.assert_close(logits(model, ids), logits(twin, ids))
    for each in (model, twin):
        each.model.layers[1].mlp.act_fn = nn.GELU()
        each.model.layers[0].self_attn.q_proj = nn.Sequential(each.model.layers[0].self_attn.q_proj)
    torch.testing.assert_close(logits(model, ids), logits(twin, ids))


def test_no_weight_is_copied(ids, device):
    """Matrices are read where they lie: the same parameters before, while it is fused, and after; and nothing held beside them."""
    model = make(device=device)
    where = {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules() if name}
    llama_fast.fuse(model)
    generate(model, ids)
    assert {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()} == where
    assert {name: set(vars(module)) for name, module in model.named_modules() if name} == attributes
    llama_fast.unfuse(model)
    assert {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()} == where


def test_lora_in_a_part_leaves_the_rest(ids, device):
    model = fused(device=device)
    expected = step(get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["v_proj"])).base_model.model, ids)
    assert expected == dict(rms_norm=1, rope=1, attention_decode=1, linear=2, norm_swiglu=1)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"])).base_model.model
    assert step(adapted, ids) == dict(norm_heads=1, attention_decode=1, linear=1, rms_norm=1, glu=1)


def test_autocast_takes_separate_ops(ids, device):
    model = fused(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert "norm_heads" not in step(model, ids)


def test_attention_weights_are_given(ids, device):
    plain, model = make(device=device, attn_implementation="eager"), fused(device=device)
    with torch.no_grad():
        ours, theirs = (each(ids, output_attentions=True).attentions for each in (model, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_decoding_step_compiles_whole(family, ids, device):
    model = fused(family, device, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids))

    def last(model):
        cache = StaticCache(config=model.config, max_cache_len=8)
        logits(fused_model, ids[:, :-1], **{CACHE_NAME: cache})
        return logits(model, ids[:, -1:], **{CACHE_NAME: cache})

    fused_model = model
    torch.testing.assert_close(last(compiled), last(model))
