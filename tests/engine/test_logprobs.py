"""Log-probabilities as requests have them: of how many tokens, with which rank, text and sum."""

import math

import pytest

from llama_fast.engine.sampling import SamplingParams
from tests.decoder.models import VOCAB, random_ids
from tests.engine.engines import assert_nothing_left, engine
from tests.parity import not_interpreted

pytestmark = not_interpreted

PROMPTS = [random_ids(length, seed=length) for length in (30, 5, 1)]


@pytest.fixture(params=[False, True], ids=["read at once", "read late"])
def llm(request, folder):
    llm = engine(folder("llama"), read_late=request.param, max_context=64, block_size=4, step_tokens=12)
    yield llm
    assert_nothing_left(llm)


def asking(count, **options):
    return SamplingParams(
        **(dict(seed=1, temperature=2.0, max_tokens=12, logprobs=count, prompt_logprobs=count) | options)
    )


def test_all_of_the_vocabulary(llm):
    """-1 asks for it, beside requests that ask for less or nothing."""
    each = [asking(-1), asking(2, seed=2), asking(None)]
    whole, two, none = llm.generate(PROMPTS, each)
    assert llm.generate(PROMPTS, [asking(VOCAB), *each[1:]]) == [whole, two, none]
    entries = [*whole.logprobs, *whole.prompt_logprobs]
    assert len(entries) == 12 + len(PROMPTS[0]) - 1
    for entry in entries:
        assert sorted(entry.top) == list(range(VOCAB)) == sorted(entry.texts)
        assert math.isclose(math.fsum(map(math.exp, entry.top.values())), 1, rel_tol=1e-5)
        assert list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
        assert list(entry.top)[entry.rank - 1] == entry.token_id and entry.top[entry.token_id] == entry.logprob
    assert {len(entry.top) for entry in two.logprobs} == {2} and none.logprobs is None


def test_ranks_and_texts(llm):
    """Of a token that is not among the likeliest, too."""
    (drawn,) = llm.generate(PROMPTS[0], asking(2))
    (whole,) = llm.generate(PROMPTS[0], asking(-1))
    for few, all_ in zip(
        [*drawn.logprobs, *drawn.prompt_logprobs], [*whole.logprobs, *whole.prompt_logprobs], strict=True
    ):
        assert (few.token_id, few.rank) == (all_.token_id, all_.rank) and list(few.top) == list(all_.top)[:2]
        assert few.texts == {i: f"w{i}" for i in (few.token_id, *few.top)}
    assert max(entry.rank for entry in drawn.logprobs) > 2
    (greedy,) = llm.generate(PROMPTS[0], asking(0, temperature=0.0))
    assert {entry.rank for entry in greedy.logprobs} == {1} and {len(entry.texts) for entry in greedy.logprobs} == {1}


def test_the_text_of_special_tokens_and_of_halves_of_characters():
    llm = engine()
    half = llm.tokenizer.encode("\N{LLAMA}")[1]
    for token_id in (half, *llm.tokenizer.eos_ids):
        (out,) = llm.generate("Hi", SamplingParams(allowed_token_ids=[token_id], max_tokens=1, logprobs=0))
        assert out.logprobs[0].texts == {token_id: llm.tokenizer.decode([token_id], skip_special=False)}
        assert out.logprobs[0].texts[token_id]


def test_the_sum(llm):
    (out,) = llm.generate(PROMPTS[0], asking(0, n=2))
    for output in out.outputs:
        assert math.isclose(output.cumulative_logprob, math.fsum(entry.logprob for entry in output.logprobs))
        assert output.cumulative_logprob < 0
    assert llm.generate(PROMPTS[0], asking(None))[0].cumulative_logprob is None
    assert llm.generate(PROMPTS[0], asking(0, max_tokens=0))[0].cumulative_logprob == 0


def test_who_asks_for_none_has_none_computed(llm, monkeypatch):
    monkeypatch.setattr(llm._core, "_text_of", lambda _: pytest.fail("a text was made"))
    monkeypatch.setattr("llama_fast.engine.sampling.logprobs_of", lambda *_: pytest.fail("log-probabilities were made"))
    assert len(llm.generate(PROMPTS, asking(None))) == 3
