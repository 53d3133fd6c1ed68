"""A trained model, which its own numbers make more of a test than random weights do."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_fast
from llama_fast.fusion.report import KINDS
from tests.checkpoints import DREAM, needs_dream
from tests.fusion.models import assert_fused_ran, assert_within_rule, generate, logits, logits_in_float64
from tests.parity import CalledOps, not_interpreted

PROMPTS = ["Once upon a time, there was a little girl", "The dog", "Tom and Lily went to the park. They saw"]

pytestmark = [not_interpreted, needs_dream]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, device):
    return AutoModelForCausalLM.from_pretrained(DREAM, dtype=request.param).to(device).eval()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DREAM)


def test_logits_tokens_and_the_way_back(model, tokenizer, device):
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids.to(device)
    tokens, plain = generate(model, ids, max_new_tokens=64), logits(model, ids)
    exact = logits_in_float64(model, tokens)
    theirs = logits(model, tokens)
    report = llama_fast.fuse(model)
    assert not report.left, str(report)
    with CalledOps() as ran:
        ours = logits(model, tokens)
    assert_fused_ran(ran, {kind: report.count(kind) for kind in KINDS})
    assert_within_rule("logits", ours, theirs, exact)
    if model.dtype == torch.float32:
        assert torch.equal(generate(model, ids, max_new_tokens=64), tokens)
    llama_fast.unfuse(model)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("options", [{}, dict(do_sample=True), dict(num_beams=4), dict(cache_implementation="static")])
def test_a_padded_batch(options, model, tokenizer, device):
    if model.dtype != torch.float32:
        pytest.skip("tokens are compared in float32: bfloat16 rounds two of them to the same logit")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left").to(device)
    options = dict(attention_mask=batch.attention_mask, max_new_tokens=40) | options
    tokens = generate(model, batch.input_ids, **options)
    llama_fast.fuse(model)
    assert torch.equal(generate(model, batch.input_ids, **options), tokens)
