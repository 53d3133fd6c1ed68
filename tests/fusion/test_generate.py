"""`model.generate` on a fused model gives the tokens it gave before."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import llama_fast
from llama_fast import ops
from llama_fast.fusion.neighbours import CACHE_NAME
from tests.fusion.models import (
    FAMILIES,
    assert_fused_ran,
    assert_within_rule,
    generate,
    logits,
    logits_in_float64,
    make,
    random_ids,
)
from tests.parity import CalledOps, not_interpreted

pytestmark = not_interpreted

WAYS = {
    "sampling": dict(do_sample=True, temperature=1.5, top_k=20),
    "beams": dict(num_beams=3),
    "static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
    "chunked prefill": dict(prefill_chunk_size=4),
}
families = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])


def padded(ids, padding):
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return torch.where(mask.bool(), ids, 0), mask


@pytest.mark.parametrize("way", WAYS)
@families
def test_same_tokens(family, way, device):
    plain, fused, ids = make(family, device), make(family, device), random_ids(device=device)
    llama_fast.fuse(fused)
    with CalledOps() as ran:
        tokens = generate(fused, ids, **WAYS[way])
    assert torch.equal(tokens, generate(plain, ids, **WAYS[way]))
    pieces = 2 if way == "chunked prefill" else 0  # 12 tokens by 4
    assert_fused_ran(ran, FAMILIES[family][2], passes=20 + pieces)


@pytest.mark.parametrize("way", ["greedy", "beams", "static cache"])
@families
def test_left_padded_rows_are_equal_to_rows_alone(family, way, device):
    model = make(family, device)
    llama_fast.fuse(model)
    options = WAYS.get(way, {})
    ids, mask = padded(random_ids(device=device), 5)
    together = generate(model, ids, attention_mask=mask, **options)
    assert torch.equal(together[:1], generate(model, ids[:1], **options))
    assert torch.equal(together[1:, 5:], generate(model, ids[1:, 5:], **options))


def test_decoding_takes_its_own_kernel_and_copies_nothing(device, monkeypatch):
    model, ids = make(device=device), random_ids(device=device)
    llama_fast.fuse(model, verify=False)
    cache = DynamicCache(config=model.config)
    seen, attention_decode = [], ops.attention_decode

    def decode(q, k, v, *args, **options):
        seen.append((k, v))
        return attention_decode(q, k, v, *args, **options)

    monkeypatch.setattr(ops, "attention_decode", decode)
    logits(model, ids, **{CACHE_NAME: cache})
    assert not seen
    logits(model, ids[:, :1], **{CACHE_NAME: cache})
    assert [(k.data_ptr(), v.data_ptr()) for k, v in seen] == [
        (layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers
    ]
    model.train()(ids[:, :1], labels=ids[:, :1], shift_labels=ids[:, 1:2]).loss.backward()  # it has no gradient


def test_assisted_generation(device):
    plain, fused = make(device=device), make(device=device)
    llama_fast.fuse(fused)
    ids = random_ids(1, 6, device=device).repeat(1, 3)
    looking_up = dict(prompt_lookup_num_tokens=3)
    assert torch.equal(generate(fused, ids, **looking_up), generate(plain, ids, **looking_up))
    assistant = make(device=device, num_hidden_layers=1)
    expected = generate(plain, ids, assistant_model=copy.deepcopy(assistant))
    llama_fast.fuse(assistant)
    assert torch.equal(generate(fused, ids, assistant_model=assistant), expected)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@families
def test_a_cache_filled_piece_by_piece(family, kind, device):
    plain, fused, ids = make(family, device), make(family, device), random_ids(2, 14, device=device)
    llama_fast.fuse(fused)
    settings = {} if kind is DynamicCache else dict(max_cache_len=20)

    def pieces(model):
        cache = kind(config=model.config, **settings)
        return torch.cat([logits(model, part, **{CACHE_NAME: cache}) for part in ids.split([8, 4, 1, 1], dim=1)], dim=1)

    with CalledOps() as ran:
        ours = pieces(fused)
    assert_fused_ran(ran, FAMILIES[family][2], passes=4)
    assert_within_rule(f"logits with {kind.__name__}", ours, pieces(plain), logits_in_float64(plain, ids))


def test_a_compiled_step_with_a_static_cache(device):
    """What `generate` compiles by itself on a GPU, with masks made outside of the compiled step."""
    model = make(device=device)
    llama_fast.fuse(model)
    ids, mask = padded(random_ids(device=device), 5)
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=4)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, **{CACHE_NAME: cache})
        for _ in range(3):
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.cat([mask, mask[:, -1:]], dim=1)
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1, **{CACHE_NAME: cache}, attention_mask=mask
            )
            assert inputs["attention_mask"].dtype == torch.int32
            out = step(**inputs)
    assert torch.equal(torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1), expected)
