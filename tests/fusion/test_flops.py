"""What `torch.utils.flop_counter` counts of a fused model is what it counts of a plain one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llama_fast
from tests.fusion.models import make, random_ids
from tests.parity import not_interpreted

pytestmark = not_interpreted


def count(model, ids, *, trains: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        loss = model(ids, labels=ids, use_cache=False).loss
        if trains:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_fused_model_counts_as_much_as_a_plain_one(kind, mode):
    """Of plain attention only the eager one has formulas on a CPU. It keeps its scores, which flash attention's backward
    computes again, and PyTorch's own formula of that counts them: one product more for each layer."""
    model = make(kind)
    model.set_attn_implementation("eager")
    ids = random_ids()
    trains = mode == "training"
    plain = count(model, ids, trains=trains)
    assert not llama_fast.fuse(model, mode=mode).left
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 2 * ids.shape[0] * config.num_attention_heads * ids.shape[1] ** 2 * head_dim
    again = config.num_hidden_layers * scores if trains else 0
    assert count(model, ids, trains=trains) == plain + again
