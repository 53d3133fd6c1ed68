"""Each family: what is swapped, logits and gradients within the rule, the same tokens, and the way back."""

import pytest
import torch

import llama_fast
from tests.fusion.models import (
    FAMILIES,
    assert_fused_ran,
    assert_within_rule,
    generate,
    gradients_in_float64,
    logits,
    logits_in_float64,
    loss_and_gradients,
    make,
    random_ids,
)
from tests.parity import CalledOps, not_interpreted

families = pytest.mark.parametrize("family", FAMILIES)


@not_interpreted
@families
def test_what_is_swapped(family, device):
    report = llama_fast.fuse(make(family, device), mode="training")
    assert {kind: report.count(kind) for kind in FAMILIES[family][2]} == FAMILIES[family][2]
    assert all(swapped.error is not None for swapped in report.swapped)


@not_interpreted
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "stablelm"])
def test_nothing_is_left(family, mode, device):
    """On every transformers that is supported, with its names for things; and what is swapped runs: a prompt, and a step after it."""
    model, swapped = make(family, device), dict(FAMILIES[family][2])
    report = llama_fast.fuse(model, mode=mode)
    assert not report.left, str(report)
    with CalledOps() as ran:
        generate(model, random_ids(device=device), max_new_tokens=2)
    assert_fused_ran(ran, swapped, passes=2)
    assert "llama_fast.attention_decode.default" in ran
    with CalledOps() as ran:
        loss_and_gradients(model, random_ids(device=device))
    assert_fused_ran(ran, swapped if mode == "training" else swapped | dict(loss=0), trains=True)


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@families
def test_logits(family, dtype, device):
    plain, ids = make(family, device, dtype), random_ids(device=device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # left padding
    fused = make(family, device, dtype)
    llama_fast.fuse(fused)
    for inputs in ({}, dict(attention_mask=mask)):
        counted = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        with CalledOps() as ran:
            ours = logits(fused, ids, **inputs)[counted]
        assert_fused_ran(ran, FAMILIES[family][2])
        theirs, exact = (f(plain, ids, **inputs)[counted] for f in (logits, logits_in_float64))
        assert_within_rule(f"logits with {list(inputs)}", ours, theirs, exact)


@not_interpreted
@families
def test_gradients(family, device):
    plain, fused, ids = make(family, device), make(family, device), random_ids(device=device)
    llama_fast.fuse(fused, mode="training")
    with CalledOps() as ran:
        ours = loss_and_gradients(fused, ids)
    assert_fused_ran(ran, FAMILIES[family][2], trains=True)
    theirs, exact = loss_and_gradients(plain, ids), gradients_in_float64(plain, ids)
    assert set(ours) == set(theirs)
    for name in exact:
        assert_within_rule(name, ours[name], theirs[name], exact[name], gradient=True)


@not_interpreted
@families
def test_greedy_tokens(family, device):
    model, ids = make(family, device), random_ids(device=device)
    plain = generate(model, ids, max_new_tokens=64)
    llama_fast.fuse(model)
    with CalledOps() as ran:
        assert torch.equal(generate(model, ids, max_new_tokens=64), plain)
    assert_fused_ran(ran, FAMILIES[family][2], passes=64)


@not_interpreted
@families
def test_unfuse_restores_everything(family, device):
    model, ids = make(family, device), random_ids(device=device)
    config, before = model.config, logits(model, ids)
    state = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    implementation = config._attn_implementation
    llama_fast.fuse(model, mode="training")
    assert model.config._attn_implementation == "llama_fast"
    llama_fast.unfuse(model)
    assert model.config is config
    assert config._attn_implementation == implementation
    for name, module in model.named_modules():
        kind, attributes = state[name]
        assert type(module) is kind, name
        assert module.__dict__.keys() == attributes.keys(), name
        assert all(module.__dict__[key] is value for key, value in attributes.items()), name
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_on_the_kernels(family, device):
    """The one test of a whole model that runs in the interpreter too: forward, backward and a decoding step, tiny."""
    plain, fused = (make(family, device, num_hidden_layers=1) for _ in range(2))
    report = llama_fast.fuse(fused, mode="training")
    expected = {kind for kind, count in FAMILIES[family][2].items() if count}
    assert {swapped.kind for swapped in report.swapped} == expected, str(report)
    ids = random_ids(2, 5, device=device)
    ours, theirs, exact = (
        loss_and_gradients(fused, ids),
        loss_and_gradients(plain, ids),
        gradients_in_float64(plain, ids),
    )
    for name in exact:
        assert_within_rule(name, ours[name], theirs[name], exact[name], gradient=True)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    step = dict(attention_mask=mask, max_new_tokens=2)
    assert torch.equal(generate(fused.eval(), ids, **step), generate(plain.eval(), ids, **step))
