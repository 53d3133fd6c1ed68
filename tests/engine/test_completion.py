"""Requests at their edges: what a prompt may be, how a completion ends, and what comes with its tokens."""

import dataclasses
import itertools
import math

import numpy
import pytest
import torch

from llama_fast.engine.request import Piece
from llama_fast.engine.sampling import SamplingParams
from tests.decoder.models import VOCAB, as_tensor, llama_tokens, make, random_ids, save
from tests.engine.engines import Watch, assert_nothing_left, engine
from tests.parity import not_interpreted

pytestmark = not_interpreted

PROMPT = random_ids(12)
CONTEXT = 64


def greedy(max_tokens=20, **options):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    """What PROMPT gets greedily, by transformers."""
    return llama_tokens(tuple(PROMPT), 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory, tokens):
    """The same model, whose end token is the fifth that PROMPT gets, and whose texts begin with nothing."""
    assert tokens[4] not in tokens[:4]
    model = make(eos_token_id=tokens[4])
    return save(model, tmp_path_factory.mktemp("ending"), bos=False)


@pytest.fixture(params=[False, True], ids=["read at once", "read late"])
def llm(request, folder):
    llm = engine(folder, read_late=request.param, max_context=CONTEXT, block_size=4)
    yield llm
    assert_nothing_left(llm)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_forms_of_prompts(llm, tokens):
    """One prompt or several; ids in anything that holds integers."""
    text = " ".join(f"w{i}" for i in PROMPT)
    for one in (PROMPT, tuple(PROMPT), numpy.array(PROMPT), torch.tensor(PROMPT), [numpy.int32(i) for i in PROMPT]):
        (completion,) = llm.generate(one, greedy())
        assert completion.token_ids == tokens and completion.prompt_token_ids == PROMPT
        assert all(type(i) is int for i in completion.prompt_token_ids)
        assert list(llm.stream(one, greedy()))[-1].completion.token_ids == tokens
    several = (
        [PROMPT, PROMPT[:3]],
        (PROMPT, PROMPT[:3]),
        (p for p in (PROMPT, PROMPT[:3])),
        [numpy.array(PROMPT), range(9, 12)],
    )
    for prompts in several:
        first, second = llm.generate(prompts, greedy())
        assert first.token_ids == tokens and len(second.token_ids) == 20
    assert llm.generate([], greedy()) == []
    assert llm.generate(text)[0].prompt_token_ids == [1, *PROMPT]
    assert [c.prompt_token_ids for c in llm.generate([text, "w5", PROMPT])] == [[1, *PROMPT], [1, 5], PROMPT]


def test_an_empty_prompt(llm, ending):
    """It is the token that begins a text, where the model has one."""
    (completion,) = llm.generate("", greedy())
    assert completion.prompt_token_ids == [1] and completion.token_ids == llama_tokens((1,), 20)
    for prompts in ("", [""], [[]]):
        with pytest.raises(ValueError, match="the prompt is empty, and this model begins no text by itself"):
            engine(ending).generate(prompts)
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate([PROMPT, []])


@pytest.mark.parametrize(
    "prompt", [[VOCAB], [3, -1], [1.5], numpy.array([0.5]), [[[3]]], [None], [5, "w5"], 5, None, b"w5"], ids=repr
)
def test_what_is_no_prompt(prompt, llm):
    with pytest.raises(ValueError, match=f"a prompt must be a string or token ids from 0 to {VOCAB - 1}, got"):
        llm.submit(prompt)
    with pytest.raises(ValueError, match="a prompt must be"):
        llm.generate([PROMPT, prompt])
    if isinstance(prompt, bytes):  # alone it is no list of token ids
        with pytest.raises(ValueError, match="a prompt must be"):
            llm.generate(prompt)


def test_prompts_and_the_context(llm, folder, tokens):
    """One as long as the context gets no token; a longer one is refused, and says what is too small."""
    full = random_ids(CONTEXT, seed=3)
    (completion,) = llm.generate(full, greedy(5, prompt_logprobs=0))
    assert completion.token_ids == [] and completion.finish_reason == "length" and completion.text == ""
    assert len(completion.prompt_logprobs) == CONTEXT - 1
    assert llm.generate(full, greedy(5))[0].token_ids == []
    (completion,) = llm.generate(full[:-1], greedy(5))
    assert completion.token_ids == llama_tokens(tuple(full[:-1]), 1) and completion.finish_reason == "length"
    with pytest.raises(ValueError, match="the prompt has 65 tokens, and the context holds 64"):
        llm.generate([full, [*full, 3]])
    small = engine(folder, max_cache_tokens=16, block_size=4)
    with pytest.raises(
        ValueError, match=r"has 17 tokens, and the KV cache \(give a larger max_cache_tokens\) holds 16"
    ):
        small.generate(full[:17])
    assert small.generate(PROMPT, greedy())[0].token_ids == tokens[:4]
    assert_nothing_left(small)


def test_no_tokens(llm):
    for params in (greedy(0), greedy(0, n=3), greedy(0, logprobs=1)):
        (completion,) = llm.generate(PROMPT, params)
        assert len(completion.outputs) == params.n
        for output in completion.outputs:
            assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
    assert list(llm.stream(PROMPT, greedy(0))) == [Piece("", llm.generate(PROMPT, greedy(0))[0])]
    watch = Watch(llm)
    (completion,) = llm.generate(PROMPT, greedy(0, n=3, prompt_logprobs=2))
    assert [output.token_ids for output in completion.outputs] == [[]] * 3
    assert [entry.token_id for entry in completion.prompt_logprobs] == PROMPT[1:]
    assert watch.computed == len(PROMPT)  # for one of the three


# --- ends ------------------------------------------------------------------------------------------------------------


def test_max_tokens(llm, tokens):
    assert llm.generate(PROMPT, greedy(1))[0].token_ids == tokens[:1]
    (completion,) = llm.generate(PROMPT, greedy(None))
    assert len(completion.token_ids) == CONTEXT - len(PROMPT) and completion.finish_reason == "length"
    assert completion.token_ids[:20] == tokens


def test_stop_ids(llm, tokens):
    (completion,) = llm.generate(PROMPT, greedy(stop_token_ids=[tokens[2]]))
    at = tokens.index(tokens[2])
    assert completion.token_ids == tokens[: at + 1] and completion.finish_reason == "stop"
    assert completion.text == "".join(f" w{i}" for i in tokens[:at])  # without what stopped it


@pytest.mark.parametrize("others", [[], ["never"], ["w"]], ids=repr)
def test_stop_strings(others, llm, tokens):
    """One that begins in the middle of a token and ends in the middle of another, two on. The first that is complete counts."""
    spelled = "".join(f" w{i}" for i in tokens)
    stop = spelled[len(f" w{tokens[0]}") + 2 :][:8]
    assert stop.count(" ") == 2
    pieces = list(llm.stream(PROMPT, greedy(stop=[*others, stop])))
    completion = pieces[-1].completion
    assert completion.text == spelled[: min(spelled.find(text) % 999 for text in (*others, stop))]
    assert completion.text == "".join(piece.text for piece in pieces)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == tokens[: len(completion.token_ids)] and len(completion.token_ids) <= 4
    if not others:
        assert llm.generate(PROMPT, greedy(stop=stop))[0] == completion


def test_half_a_stop_string_at_the_end_is_text(llm, tokens):
    last = f"w{tokens[19]}"
    (completion,) = llm.generate(PROMPT, greedy(stop=last + " never"))
    assert completion.text == "".join(f" w{i}" for i in tokens) and completion.finish_reason == "length"


def test_end_tokens(ending, tokens):
    """Each row ends by itself; what ends one is asked for or not by each request."""
    llm = engine(ending, block_size=4)
    other = random_ids(7, seed=5)
    alone = llama_tokens(tuple(other), 20)
    assert tokens[4] not in alone
    ends, goes_on, ignores, least = llm.generate(
        [PROMPT, other, PROMPT, PROMPT], [greedy(), greedy(), greedy(ignore_eos=True), greedy(min_tokens=6)]
    )
    assert ends.token_ids == tokens[:5] and ends.finish_reason == "stop"
    assert ends.text == "".join(f" w{i}" for i in tokens[:4])
    assert goes_on.token_ids == alone and goes_on.finish_reason == "length"
    assert ignores.token_ids == tokens and ignores.finish_reason == "length"
    assert least.token_ids[:4] == tokens[:4] and tokens[4] not in least.token_ids[:6] and len(least.token_ids) > 6
    assert llm.generate(PROMPT, greedy(5))[0].finish_reason == "stop"  # the last token allowed is the end token
    assert_nothing_left(llm)


def test_an_end_token_outside_the_vocabulary(tmp_path, tokens):
    """Tokenizers may have more tokens than the model: one that ends texts never comes, and changes nothing."""
    folder = save(make(), tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{VOCAB + 3}, {tokens[4]}]}}')
    llm = engine(folder)
    assert llm.generate(PROMPT, greedy())[0].token_ids == tokens[:5]
    assert tokens[4] not in llm.generate(PROMPT, greedy(8, min_tokens=8))[0].token_ids


# --- several outputs -------------------------------------------------------------------------------------------------


def test_several_outputs(llm):
    """Each is what its own seed gives alone, the prompt being computed once."""
    params = dict(temperature=1.5, max_tokens=10)
    seeds = SamplingParams(seed=7, n=3).seeds()
    singles = [llm.generate(PROMPT, SamplingParams(seed=seed, **params))[0].token_ids for seed in seeds]
    assert len({tuple(single) for single in singles}) == 3
    prompt = random_ids(21, seed=8)
    watch = Watch(llm)
    (completion,) = llm.generate(PROMPT, SamplingParams(seed=7, n=3, **params))
    assert completion.outputs[0] is completion
    assert [other["token_ids"] for other in dataclasses.asdict(completion)["others"]] == singles[1:]
    assert [output.token_ids for output in completion.outputs] == singles
    before = watch.computed
    llm.generate(prompt, SamplingParams(seed=7, n=3, **params))
    assert watch.computed - before == 21 + 2 * 1 + 3 * 9  # five blocks of four are found by the two others


def test_several_outputs_with_a_batch_of_one(folder):
    params = SamplingParams(seed=7, n=3, temperature=1.5, max_tokens=10)
    one, many = engine(folder, max_batch=1).generate(PROMPT, params)[0], engine(folder).generate(PROMPT, params)[0]
    assert [a.token_ids for a in one.outputs] == [b.token_ids for b in many.outputs]


def test_several_outputs_that_end_at_once(llm, tokens):
    (completion,) = llm.generate(PROMPT, greedy(n=3, stop_token_ids=[tokens[0]]))
    assert [output.token_ids for output in completion.outputs] == [tokens[:1]] * 3
    assert {output.finish_reason for output in completion.outputs} == {"stop"}


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelled_outputs(steps, llm, tokens):
    request = llm.submit(PROMPT, greedy(n=3))
    for _ in range(steps):
        llm.step()
    llm.cancel(request)
    assert request.done
    for output in request.completion.outputs:
        assert output.finish_reason == "cancelled" and output.token_ids == tokens[: len(output.token_ids)]
    llm.cancel(request)  # once more changes nothing
    llm.step()
    assert_nothing_left(llm)


def test_streams_are_of_one_output(llm):
    with pytest.raises(ValueError, match="n must be 1 to stream, got 2"):
        next(llm.stream(PROMPT, greedy(n=2)))


# --- parameters ------------------------------------------------------------------------------------------------------


def test_as_many_params_as_prompts(llm, tokens):
    short, long = llm.generate([PROMPT, PROMPT], [greedy(2), greedy(9)])
    assert (short.token_ids, long.token_ids) == (tokens[:2], tokens[:9])
    assert len(llm.generate([PROMPT, PROMPT], (greedy(i) for i in (2, 9)))[1].token_ids) == 9
    with pytest.raises(ValueError, match="params must be SamplingParams, got 'temperature'"):
        llm.generate(PROMPT, {"temperature": 0})
    for params in ([], [greedy()], [greedy()] * 3):
        with pytest.raises(ValueError, match=f"params must be one or as many as the prompts, 2, got {len(params)}"):
            llm.generate([PROMPT, PROMPT], params)


@pytest.mark.parametrize("name", ["allowed_token_ids", "banned_token_ids", "stop_token_ids"])
def test_params_outside_the_vocabulary(name, llm):
    with pytest.raises(ValueError, match=f"{name} must hold token ids under {VOCAB}"):
        llm.generate([PROMPT, PROMPT], [greedy(), greedy(**{name: [VOCAB]})])


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs(llm, tokens):
    """Of the chosen token always, and of as many others as each request asks for, likeliest first."""
    none, zero, two, sampled = llm.generate(
        [PROMPT] * 4,
        [
            greedy(),
            greedy(logprobs=0),
            greedy(logprobs=2),
            SamplingParams(seed=1, temperature=3.0, logprobs=2, max_tokens=20),
        ],
    )
    assert none.logprobs is None and none.prompt_logprobs is None
    assert [entry.top for entry in zero.logprobs] == [{}] * 20
    assert [entry.logprob for entry in zero.logprobs] == [entry.logprob for entry in two.logprobs]
    for entry, token_id in zip(two.logprobs, tokens, strict=True):
        (first, best), (_, second) = entry.top.items()
        assert first == entry.token_id == token_id and best == entry.logprob and best >= second
    assert any(entry.token_id not in entry.top for entry in sampled.logprobs)  # chosen, though unlikely
    assert all(
        entry.logprob <= min(entry.top.values()) for entry in sampled.logprobs if entry.token_id not in entry.top
    )


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [dict(step_tokens=5), dict(step_tokens=1), dict(max_cache_tokens=60)], ids=str)
def test_prompt_logprobs_whatever_the_schedule(options, late, folder):
    """In chunks, preempted in their midst, and although the cache knows the prompt: once each, in order."""
    prompts = [random_ids(length, seed=length) for length in (30, 20, 1, 2, 25)]
    params = greedy(25, prompt_logprobs=VOCAB)
    whole = [engine(folder).generate(prompt, params)[0] for prompt in prompts]
    llm = engine(folder, read_late=late, block_size=4, **options)
    llm.generate(prompts, greedy(2))
    watch = Watch(llm)
    for ours, expected, prompt in zip(llm.generate(prompts, params), whole, prompts, strict=True):
        assert ours.token_ids == expected.token_ids
        assert [entry.token_id for entry in ours.prompt_logprobs] == prompt[1:]
        if len(prompt) > 1:
            torch.testing.assert_close(
                as_tensor(ours.prompt_logprobs), as_tensor(expected.prompt_logprobs), rtol=1e-5, atol=1e-5
            )
    assert bool(watch.preemptions) == ("max_cache_tokens" in options)
    assert_nothing_left(llm)


def test_prompt_logprobs_of_a_long_prompt(folder):
    """More tokens than have their logits in memory at a time."""
    prompt = random_ids(200)
    llm = engine(folder)
    (completion,) = llm.generate(prompt, greedy(1, prompt_logprobs=1, n=2))
    chunked = engine(folder, step_tokens=37).generate(prompt, greedy(1, prompt_logprobs=1))[0]
    assert [entry.token_id for entry in completion.prompt_logprobs] == prompt[1:]
    assert all(
        math.isclose(a.logprob, b.logprob, rel_tol=1e-5)
        for a, b in zip(completion.prompt_logprobs, chunked.prompt_logprobs, strict=True)
    )
    assert completion.outputs[1].prompt_logprobs is None


# --- text ------------------------------------------------------------------------------------------------------------


def test_completions_compare(llm):
    """By what they hold, though each holds itself among its outputs."""
    first, again = (llm.generate(PROMPT, greedy(3))[0] for _ in range(2))
    assert first == again and first != llm.generate(PROMPT, greedy(4))[0]


def test_text_of_the_embedded_model():
    """Streamed text is the text of all tokens, and a chat has one token that begins it."""
    llm = engine()
    prompt = "Once upon a time, there was a small owl"
    params = SamplingParams(seed=3, temperature=1.2, max_tokens=40)
    pieces = list(llm.stream(prompt, params))
    completion = pieces[-1].completion
    assert "".join(piece.text for piece in pieces) == completion.text and len(pieces) > 10
    whole = llm.tokenizer.decode([*completion.prompt_token_ids, *completion.token_ids])
    assert whole == prompt + completion.text
    assert llm.generate([prompt, "Hi"], params)[0].text == completion.text
    reply = llm.chat([{"role": "user", "content": "Tell me a story about a fox."}], greedy(10))
    assert reply.prompt_token_ids.count(llm.tokenizer.bos_id) == 1 and reply.text
    cut = completion.text[10:16]
    (stopped,) = llm.generate(prompt, SamplingParams(seed=3, temperature=1.2, max_tokens=40, stop=cut))
    assert stopped.text == completion.text[: completion.text.index(cut)]


def test_half_a_character_at_the_end():
    """What no more tokens come for is shown as what it is."""
    llm = engine()
    start = llm.tokenizer.encode("\N{LLAMA}")[1]
    pieces = list(llm.stream("Hi", greedy(1, allowed_token_ids=[start])))
    assert [piece.text for piece in pieces] == ["\ufffd"] == [pieces[-1].completion.text]


def test_streams_side_by_side(llm, tokens):
    """Two streams read in turns: each has its own text."""
    streams = [llm.stream(PROMPT, greedy()), llm.stream(PROMPT[:5], greedy())]
    pieces = list(itertools.zip_longest(*streams))
    texts = ["".join(piece.text for piece in column if piece) for column in zip(*pieces, strict=True)]
    alone = llama_tokens(tuple(PROMPT[:5]), 20)
    assert texts == ["".join(f" w{i}" for i in ids) for ids in (tokens, alone)]
