"""Thirty steps of training with fused layers beside the same thirty without, and both beside float64.

Rounding errors grow as training goes on, in any implementation, so the tolerance is measured, not chosen: the plain model
trained in float32 and in float64 shows how far float32 drifts, and the fused model may drift three times as far (the error
rule's factor for gradients).
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import llama_fast
from llama_fast.fusion.verify import InFloat64
from llama_fast.kernels.parity import GRADIENT_FACTOR, error_bound, relative_error
from tests.checkpoints import DREAM, needs_dream
from tests.fusion.models import KINDS, assert_fused_ran, make
from tests.parity import CalledOps, not_interpreted

STEPS = 30

pytestmark = not_interpreted


def train(model, *, accumulate=1):
    """The losses of AdamW steps on batches of ragged documents: padded on the right, the padding ignored."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    device, losses = next(model.parameters()).device, []
    for _ in range(STEPS):
        ids = torch.randint(3, model.config.vocab_size, (4, 24), generator=generator).to(device)
        lengths = torch.randint(6, 25, (4, 1), generator=generator).to(device)
        ids = ids // 2 + 3  # half of the vocabulary, so that there is something to learn
        mask = torch.arange(24, device=device) < lengths
        labels = torch.where(mask, ids, -100)
        items = (labels[:, 1:] != -100).sum()
        total = 0.0
        for part in torch.arange(4, device=device).chunk(accumulate):
            inputs = dict(input_ids=ids[part], attention_mask=mask[part].long(), labels=labels[part])
            loss = model(**inputs, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.tensor(losses, dtype=torch.float64)


def train_in_float64(model):
    with InFloat64():
        return train(copy.deepcopy(model).double())


def assert_same_course(plain, accumulate):
    theirs, exact = train(plain), train_in_float64(plain)
    assert exact[-5:].mean() < exact[:5].mean(), "there must be something to learn"
    fused = copy.deepcopy(plain)
    report = llama_fast.fuse(fused, mode="training")
    assert not [left for left in report.left if left.kind != "residual"], str(report)
    with CalledOps() as ran:
        ours = train(fused, accumulate=accumulate)
    swapped = {kind: report.count(kind) for kinds in KINDS.values() for kind in kinds}
    assert_fused_ran(ran, swapped, passes=STEPS * accumulate, trains=True)
    error, peer_error = relative_error(ours, exact), relative_error(theirs, exact)
    bound = error_bound(peer_error, torch.float32, factor=GRADIENT_FACTOR)
    assert error <= bound, f"losses are off by {error:.2e}, transformers' by {peer_error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize(("family", "accumulate"), [("llama", 1), ("llama", 2), ("qwen3", 1), ("gemma2", 1)])
def test_random_weights(family, accumulate, device):
    assert_same_course(make(family, device), accumulate)


@needs_dream
def test_a_trained_model(device):
    assert_same_course(AutoModelForCausalLM.from_pretrained(DREAM, dtype=torch.float32).to(device), 1)
