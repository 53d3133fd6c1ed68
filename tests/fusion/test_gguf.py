"""`fuse` on models that transformers has read from a .gguf file."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import llama_fast
from tests.decoder.gguf.files import write_model
from tests.decoder.gguf.test_model import make
from tests.fusion.models import assert_within_rule, generate, logits, logits_in_float64
from tests.parity import not_interpreted
from tests.real_model import needs_real_model, real_model

pytestmark = not_interpreted


def assert_fused_as_well(path, ids):
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = generate(model, ids, max_new_tokens=8)
    theirs, exact = logits(model, tokens), logits_in_float64(model, tokens)
    report = llama_fast.fuse(model)
    assert report.swapped and not report.left, str(report)
    assert_within_rule("logits", logits(model, tokens), theirs, exact)
    assert torch.equal(generate(model, ids, max_new_tokens=8), tokens)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_tiny_model(architecture, tmp_path):
    write_model(tmp_path / "a.gguf", make(architecture), "Q4_0")
    assert_fused_as_well(tmp_path / "a.gguf", torch.arange(24)[None] * 5)


@pytest.mark.nightly  # half a minute; trained weights are also in tests/convergence
@needs_real_model
def test_a_real_model():
    assert_fused_as_well(real_model(), torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]]))
