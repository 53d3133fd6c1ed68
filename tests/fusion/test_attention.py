"""The attention and mask functions that transformers calls: every mask means what transformers' own mask means."""

import pytest
import torch
import transformers
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import llama_fast
from llama_fast.fusion.attention import dense_mask, eager_attention, fused_attention, fused_mask
from tests.fusion.models import assert_within_rule, logits, make, random_ids
from tests.parity import not_interpreted

pytestmark = not_interpreted

PATTERNS = {
    "causal": dict(mask_function=causal_mask_function),
    "window": dict(mask_function=sliding_window_causal_mask_function(4), local_size=4),
}
PADDING = {
    "none given": None,
    "no padding": [[1] * 9, [1] * 9],
    "left": [[1] * 9, [0] * 3 + [1] * 6],
    "a row of padding": [[1] * 9, [0] * 9],
    "right": [[1] * 9, [1] * 6 + [0] * 3],
    "a hole": [[1] * 9, [1] * 2 + [0] * 3 + [1] * 4],
    "too short": [[1] * 7, [1] * 7],
}
CALLS = {
    "prefill": dict(q_length=9, kv_length=9),
    "second chunk": dict(q_length=3, kv_length=9, q_offset=6),
    "decoding": dict(q_length=1, kv_length=9, q_offset=8),
    "static prefill": dict(q_length=9, kv_length=14),
    "static chunk": dict(q_length=3, kv_length=14, q_offset=torch.tensor(6)),
    "static decoding": dict(q_length=1, kv_length=14, q_offset=torch.tensor(8)),
    "cache of a window": dict(q_length=2, kv_length=5, q_offset=7, kv_offset=4),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_mean_what_transformers_means(pattern, padding, call):
    given = None if PADDING[padding] is None else torch.tensor(PADDING[padding], dtype=torch.bool)
    arguments = dict(batch_size=2, attention_mask=given, **PATTERNS[pattern], **CALLS[call])
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = fused_mask(**arguments)
    q_length, kv_length = CALLS[call]["q_length"], CALLS[call]["kv_length"]
    assert torch.equal(dense_mask(mask, q_length, kv_length, is_causal=True).expand_as(expected), expected)
    is_dense = mask is not None and mask.dtype == torch.bool
    may_be_dense = pattern == "window" or "static" in call
    assert is_dense == (padding in ("right", "a hole", "too short") and may_be_dense), (
        "plain patterns must not become dense masks"
    )


def test_masks_while_compiling():
    """The mask cannot be read then, and must not become dense for it."""
    compiled = torch.compile(fused_mask, fullgraph=True, backend="eager")
    for padding in ("left", "right", "a hole"):
        given = torch.tensor(PADDING[padding], dtype=torch.bool)
        mask = compiled(2, 9, 9, attention_mask=given)
        assert mask.shape == (2, 1, 1, 9)
        expected = sdpa_mask(2, 9, 9, attention_mask=given, allow_is_causal_skip=False)
        assert torch.equal(dense_mask(mask, 9, 9, is_causal=True), expected)


def test_other_patterns_are_dense():
    both = and_masks(sliding_window_overlay(3), sliding_window_overlay(4), causal_mask_function)
    mask = fused_mask(2, 9, 9, mask_function=both, local_size=4)
    assert torch.equal(mask, sdpa_mask(2, 9, 9, mask_function=both, allow_is_causal_skip=False))


def test_columns_of_key_ranges_are_contiguous():
    ranges = fused_mask(2, 1, 9, q_offset=8, attention_mask=torch.tensor(PADDING["left"], dtype=torch.bool))
    assert ranges.dtype == torch.int32
    assert ranges[:, 0, 0].tolist() == [[0, 9], [3, 9]]
    assert all(ranges[:, 0, 0, i].is_contiguous() for i in range(2))


@pytest.fixture
def qkv(device):
    q, k, v = (torch.randn(2, heads, 9, 16, device=device) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("padding", ["none given", "left", "a hole"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_is_what_plain_pytorch_computes(pattern, padding, qkv, device):
    module = make(device=device).model.layers[0].self_attn
    given = None if PADDING[padding] is None else torch.tensor(PADDING[padding], dtype=torch.bool, device=device)
    # a layer that does not say its window gets the window of the mask
    for q, window in ((qkv[0], 4), (qkv[0], None), (qkv[0][:, :, -1:], 4)):
        q_length = q.shape[2]
        mask = fused_mask(
            2, q_length, 9, q_offset=9 - q_length, attention_mask=given, device=device, **PATTERNS[pattern]
        )  # fmt: skip
        arguments = dict(attention_mask=mask, scaling=0.3, softcap=5.0, sliding_window=window)
        out, weights = fused_attention(module, q, *qkv[1:], **arguments)
        theirs, _ = eager_attention(module, q, *qkv[1:], **arguments)
        exact, _ = eager_attention(module, *(t.double() for t in (q, *qkv[1:])), **arguments)
        counted = torch.ones(2, q_length, dtype=torch.bool) if given is None else given[:, -q_length:]
        assert weights is None
        assert_within_rule(pattern, out[counted], theirs[counted], exact[counted])


def test_masks_of_ones_own(device):
    """A boolean 4-D mask goes to the kernels, a float one to PyTorch's ops."""
    plain, fused, ids = make(device=device), make(device=device), random_ids(length=9, device=device)
    llama_fast.fuse(fused)
    allowed = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    allowed[:, 2] = False
    allowed[2, 2] = True
    for mask in (allowed, torch.zeros(9, 9, device=device).masked_fill(~allowed, float("-inf"))):
        mask = mask.expand(2, 1, 9, 9)
        torch.testing.assert_close(logits(fused, ids, attention_mask=mask), logits(plain, ids, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_mask_of_integers_is_not_taken_for_key_ranges(dtype, device):
    model = make(device=device)
    llama_fast.fuse(model)
    mask = torch.ones(1, 1, 1, 5, dtype=dtype, device=device)
    with pytest.raises(TypeError, match="mask must be bool"):
        logits(model, random_ids(1, 1, device=device), attention_mask=mask)


def test_attention_in_both_directions_needs_no_mask():
    """Without padding: a dense mask would keep the kernels from their fast path."""
    arguments = dict(batch_size=2, q_length=9, kv_length=9, mask_function=bidirectional_mask_function)
    assert fused_mask(**arguments, allow_is_bidirectional_skip=True) is None
    assert fused_mask(**arguments).all()
    given = torch.tensor(PADDING["right"], dtype=torch.bool)
    mask = fused_mask(**arguments, attention_mask=given, allow_is_bidirectional_skip=True)
    assert torch.equal(mask, given[:, None, None, :].expand_as(mask))


def test_packed_documents_do_not_see_each_other(device):
    model, ids = make(device=device), random_ids(1, 9, device=device)
    llama_fast.fuse(model)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=device)
    packed = logits(model, ids, position_ids=positions, use_cache=False)
    alone = torch.cat([logits(model, ids[:, :4]), logits(model, ids[:, 4:])], dim=1)
    torch.testing.assert_close(packed, alone)


def test_attention_weights_are_given_when_asked_for(device):
    plain, fused, ids = make(device=device, attn_implementation="eager"), make(device=device), random_ids(device=device)
    llama_fast.fuse(fused)
    wanted = dict(output_attentions=True, output_hidden_states=True)
    ours, theirs = fused(ids, **wanted), plain(ids, **wanted)
    for name in ("attentions", "hidden_states"):
        assert len(ours[name]) == len(theirs[name]) > 0
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b)


def test_attention_weights_of_generated_tokens(device):
    plain, fused, ids = make(device=device, attn_implementation="eager"), make(device=device), random_ids(device=device)
    llama_fast.fuse(fused)
    wanted = dict(output_attentions=True, return_dict_in_generate=True, max_new_tokens=3, pad_token_id=0)
    ours, theirs = fused.generate(ids, **wanted), plain.generate(ids, **wanted)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(sum(ours.attentions, ()), sum(theirs.attentions, ()), strict=True):
        torch.testing.assert_close(a, b)


def test_a_config_that_asks_for_attention_weights_keeps_its_attention(device):
    model, ids = make(device=device, attn_implementation="eager", output_attentions=True), random_ids(device=device)
    expected = model(ids).attentions
    report = llama_fast.fuse(model)
    reason = "the model's config asks for attention weights, which the kernels do not give"
    assert {left.reason for left in report.left} == {reason}
    assert report.count("rope") == report.count("residual") == 2
    for ours, theirs in zip(model(ids).attentions, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_is_dropped_out(device):
    model, ids = make(device=device, attention_dropout=0.5), random_ids(device=device)
    report = llama_fast.fuse(model)
    assert report.count("attention") == 2
    before = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    model.train()
    assert not torch.equal(logits(model, ids), before)
    llama_fast.unfuse(model)
    report = llama_fast.fuse(model, mode="training")
    assert {left.reason for left in report.left} == {"its attention drops out 0.5, which the kernels do not"}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "cache"])
def test_another_kind_of_attention_is_refused_by_name(name, qkv):
    module = make().model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match=f"does not take {name}"):
        fused_attention(module, *qkv, None, **{name: torch.zeros(4)})


def test_a_model_without_an_attention_we_know_keeps_its_own():
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
    )
    model = transformers.CLIPTextModel(config).eval()
    before = model.config._attn_implementation
    llama_fast.fuse(model, verify=False)
    assert model.config._attn_implementation == before
