"""Words that are never completed: beside transformers, beside a plain loop, and in whatever schedule."""

import random

import pytest
import torch
from transformers.generation import logits_process as theirs

from llama_fast.engine.sampling import Needs, Sampler, SamplingParams
from tests.decoder.models import VOCAB, llama_tokens, make, random_ids
from tests.engine.engines import Watch, assert_nothing_left, engine
from tests.parity import not_interpreted

GREEDY = SamplingParams(temperature=0.0)
PROMPT = random_ids(12)


# --- the tables ------------------------------------------------------------------------------------------------------


def forbidden(words, output):
    """The tokens that would complete one of `words` after `output`."""
    return {word[-1] for word in words if list(output[len(output) - len(word) + 1 :]) == list(word[:-1])}


def masked(sampler, logits, rows):
    """What each row may not choose next, by the scores that it chooses from."""
    scores = logits.expand(len(rows), -1)
    if sampler.needs(rows).bad_words:
        scores = sampler._bad_words.forbid(scores, torch.tensor(rows, device=logits.device))
    return [set(row.isneginf().nonzero()[:, 0].tolist()) for row in scores]


def test_the_tables_are_a_plain_loop(device):
    """Rows come, go and are preempted, with words of any number and length, so that the tables grow; others have none."""
    rng = random.Random(3)
    sampler, logits = Sampler(9, 6, device=device), torch.randn(1, 9, device=device)
    rows = {}
    for i in range(300):
        row = rng.randrange(6)
        if row not in rows or rng.random() < 0.1:
            most = rng.choice([0, 1, 3, i // 8])
            words = [[rng.randrange(8) for _ in range(rng.choice([1, 2, 2 + i // 60]))] for _ in range(most)]
            rows[row] = words, [rng.randrange(9) for _ in range(rng.choice([0, 1, 9]))]
            sampler.add(row, GREEDY, seed=0, prompt_ids=[1, 2, 3], output_ids=rows[row][1], bad_words=words)
        elif rng.random() < 0.2:  # preempted, and back in a row that was another's
            sampler.add(row, GREEDY, seed=0, prompt_ids=[1, 2, 3], output_ids=rows[row][1], bad_words=rows[row][0])
        some = rng.sample(sorted(rows), rng.randint(1, len(rows)))
        assert masked(sampler, logits, some) == [forbidden(*rows[row]) for row in some]
        chosen = sampler.sample(logits.expand(len(some), -1), torch.tensor(some, device=device), sampler.needs(some))
        for row, token_id in zip(some, chosen.token_ids.tolist(), strict=True):
            assert token_id not in forbidden(*rows[row])
            rows[row][1].append(token_id)
    assert sampler._bad_words.shape == (32, 8)


def test_words_end_as_transformers_ends_them(device):
    words, output = [[5], [7, 9, 2], [9, 2, 4], [2, 6], [3, 8], [9, 9, 2, 6]], [7, 7, 9, 2]
    sampler, logits = Sampler(20, 1, device=device), torch.randn(1, 20, device=device)
    sampler.add(0, GREEDY, seed=0, prompt_ids=[3], output_ids=output, bad_words=words)
    expected = theirs.NoBadWordsLogitsProcessor(words)(torch.tensor([output], device=device), logits)
    assert masked(sampler, logits, [0]) == [set(expected[0].isneginf().nonzero()[:, 0].tolist())] == [{4, 5, 6}]


def test_who_has_no_bad_words_pays_nothing(device):
    sampler = Sampler(20, 3, device=device)
    sampler.add(0, GREEDY, seed=0, prompt_ids=[3])
    assert sampler._bad_words is None and sampler.needs([0]) == Needs()
    sampler.add(1, GREEDY, seed=0, prompt_ids=[3], bad_words=[[1, 2, 3]])
    assert sampler.needs([0]) == Needs() and sampler.needs([0, 1]) == Needs(bad_words=(1, 4))


# --- requests --------------------------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_generate(late, folder):
    """As transformers generates; of several outputs each, beside others that may say everything, preempted and resumed."""
    free = llama_tokens(tuple(PROMPT), 20)
    ids = [[free[1]], [free[3], free[4]], free[6:9], [5, 6]]
    model = make()
    expected = model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64), max_new_tokens=20,
        do_sample=False, bad_words_ids=ids, pad_token_id=0, eos_token_id=None,
    )[0, len(PROMPT) :].tolist()  # fmt: skip
    words = [" ".join(f"w{i}" for i in word) for word in ids]
    banned = SamplingParams(temperature=0.0, max_tokens=20, bad_words=[*words, f" {words[0]}", "w5 w6"], n=2)
    may = SamplingParams(temperature=0.0, max_tokens=20)
    llm = engine(folder("llama"), max_context=64, read_late=late, max_cache_tokens=80, block_size=4)
    watch = Watch(llm)
    forbids, allows, again = llm.generate([PROMPT] * 3, [banned, may, banned])
    assert watch.preemptions and allows.token_ids == free != expected
    assert [output.token_ids for output in (*forbids.outputs, *again.outputs)] == [expected] * 4
    assert_nothing_left(llm)


@not_interpreted
def test_words_of_a_text():
    """With and without a space before them, in one token or in several."""
    llm = engine()
    params = dict(seed=2, temperature=0.7, max_tokens=60, n=4)
    prompts = ["Once upon a time", "One rainy day,"]
    free = " ".join(output.text for out in llm.generate(prompts, SamplingParams(**params)) for output in out.outputs)
    words = ["named", "went to the", " Zoe", "very"]
    assert all(f" {word.strip()} " in free for word in words[:3])
    tokens = [len(llm.tokenizer.encode(f" {word.strip()}", bos=False)) for word in words]
    assert min(tokens) == 1 < max(tokens)
    for out in llm.generate(prompts, SamplingParams(bad_words=words, **params)):
        for output in out.outputs:
            assert not any(f" {word.strip()} " in output.text for word in words), output.text


@not_interpreted
def test_bad_words_that_leave_nothing(folder):
    llm = engine(folder("llama"))
    only = dict(allowed_token_ids=[5, 6], max_tokens=4, temperature=0.0)
    with pytest.raises(ValueError, match="bad_words leave no token"):
        llm.generate(PROMPT, SamplingParams(bad_words=["w5", "w3 w6"], **only))
    assert llm.generate(PROMPT, SamplingParams(bad_words=["w5"], **only))[0].token_ids == [6] * 4
    assert llm.generate(PROMPT, SamplingParams(bad_words=["w5", f"w{VOCAB}"], **only))[0].token_ids == [6] * 4


@pytest.mark.parametrize("words", [[""], ["a", " "], 5, [5], b"a"], ids=repr)
def test_what_is_no_word(words):
    with pytest.raises(ValueError, match="bad_words must"):
        SamplingParams(bad_words=words)
    assert SamplingParams(bad_words="two words").bad_words == ("two words",)
    assert SamplingParams(bad_words=None) == SamplingParams(bad_words=[]) == SamplingParams()
