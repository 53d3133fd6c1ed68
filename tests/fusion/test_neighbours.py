"""Names of transformers, PEFT and accelerate: in one file, with all their spellings."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import llama_fast.fusion
from llama_fast import fuse
from llama_fast.fusion.neighbours import CACHE_NAME, CACHE_NAMES
from tests.fusion.models import make, random_ids
from tests.parity import not_interpreted

NEIGHBOURS = {"transformers", "peft", "accelerate"}


def test_one_file_imports_the_neighbours():
    importing = set()
    for path in Path(llama_fast.fusion.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            importing |= {path.name for name in names if name.split(".")[0] in NEIGHBOURS}
    assert importing == {"neighbours.py"}


@not_interpreted
@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated")
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_by_any_of_its_names(name, device):
    """What a fused layer takes of its own accord; a model's own forward takes what its transformers takes."""
    model, ids = make(device=device), random_ids(device=device)
    fuse(model, mode="training")
    attention, seen = model.model.layers[0].self_attn, []
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        assert torch.equal(model(ids, **{name: cache}).logits, expected)
        assert cache.get_seq_length() == ids.shape[1]
        del seen[0][CACHE_NAME]
        attention(hidden_states=seen[0].pop("hidden_states"), **seen[0], **{name: cache})
    assert cache.layers[0].get_seq_length() == 2 * ids.shape[1]
    out = model.train()(ids, labels=ids, **{name: DynamicCache(config=model.config)})
    assert out.logits is None
    assert getattr(out, CACHE_NAME).get_seq_length() == ids.shape[1]
