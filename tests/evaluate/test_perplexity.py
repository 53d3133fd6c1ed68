"""Perplexity is what transformers gives on the same tokens, each token counts once, and each byte."""

import lzma
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_fast.data import stories
from llama_fast.engine.llm import EMBEDDED_MODEL, LLM
from llama_fast.evaluate.likelihood import BATCH, likelihoods
from llama_fast.evaluate.perplexity import PASSAGE, Windows, cut, score_documents, xz_baselines
from llama_fast.evaluate.story_tasks import story_texts
from tests.decoder import models
from tests.parity import not_interpreted

pytestmark = not_interpreted

STORY = next(iter(stories.write_documents("story", 1, seed=5, held_out=True))).text
TEXTS = {
    "a story": STORY,
    "several windows": "\n".join(each.text for each in stories.write_documents("story", 9, seed=6, held_out=True)),
    "Chinese and Japanese": "今天天气很好，我们去公园玩。\n吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。"
    * 4,
    "one character": "a",
    "emoji and spaces": "  🦙👩‍👩‍👧 \t\n\n  naïve  ",
}


def by_transformers(text: str, window: int, stride: int) -> tuple[float, int]:
    """Nats and tokens of a text, window by window with a loop of its own: BOS, then as many tokens of context as there is room for."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    nats, known = 0.0, 0
    while known < len(ids):
        end = min(len(ids), window - 1 if not known else known + stride)
        inputs = torch.tensor([[tokenizer.bos_token_id, *ids[max(0, end - window + 1) : end]]])
        with torch.inference_mode():
            logprobs = model(inputs).logits[0, :-1].double().log_softmax(-1)
        losses = -logprobs.gather(1, inputs[0, 1:, None])[:, 0]
        nats, known = nats + losses[len(losses) - (end - known) :].sum().item(), end
    return nats, len(ids)


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (64, 16), (33, 32)])
@pytest.mark.parametrize("name", TEXTS)
def test_it_is_that_of_transformers_on_the_same_tokens(llm, name, window, stride):
    (passages,) = score_documents(llm, [TEXTS[name]], Windows(window=window, stride=stride))
    nats, tokens = by_transformers(TEXTS[name], window, stride)
    assert sum(passage.tokens for passage in passages) == tokens
    assert sum(passage.nats for passage in passages) == pytest.approx(nats, rel=1e-5)
    assert "".join(passage.text for passage in passages) == TEXTS[name]
    assert sum(passage.statistics[2] for passage in passages) == len(TEXTS[name].encode())


@given(st.integers(0, 70), st.integers(2, 20), st.data())
def test_each_token_is_scored_once_with_at_least_the_context_that_is_left(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    ids = list(range(100, 100 + length))
    scored, pieces = [], list(cut(ids, start=1, window=window, stride=stride))
    for i, (piece, count) in enumerate(pieces):
        assert piece[0] == 1 and len(piece) <= window and piece[1:] == ids[piece[1] - 100 :][: len(piece) - 1]
        assert i == 0 or len(piece) - 1 - count >= window - 1 - stride
        scored += piece[len(piece) - count :]
    assert scored == ids


def test_documents_are_read_apart_and_together_alike(llm):
    short = [text for text in TEXTS.values() if len(text) < PASSAGE]
    documents = short * 20  # more than a batch of windows
    assert len(documents) > BATCH
    together = score_documents(llm, documents, Windows(window=128))
    alone = [score_documents(llm, [text], Windows(window=128))[0] for text in short]
    for i, passages in enumerate(together):
        for passage, right in zip(passages, alone[i % len(alone)], strict=True):
            assert (passage.text, passage.tokens) == (right.text, right.tokens)
            assert passage.nats == pytest.approx(right.nats, rel=1e-5)


def test_passages_are_the_same_for_any_tokenizer(llm, tmp_path):
    text = " ".join(f"w{i % 90 + 3}" for i in range(700))
    words = LLM(models.save(models.make(eos_token_id=2), tmp_path), device="cpu", dtype="float32")
    of_words, of_bytes = (score_documents(each, [text], Windows(window=100))[0] for each in (words, llm))
    assert [passage.text for passage in of_words] == [passage.text for passage in of_bytes]
    assert [len(passage.text) for passage in of_words[:-1]] == [PASSAGE] * (len(of_words) - 1)
    assert sum(passage.tokens for passage in of_words) == 700


def test_a_token_counts_where_it_ends(llm):
    text = TEXTS["several windows"][: PASSAGE + PASSAGE // 2]
    ids, ends = llm.tokenizer.encode_with_ends(text)
    assert ends == [len(llm.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    logprobs = llm.logits([llm.tokenizer.bos_id, *ids]).double().log_softmax(-1)
    losses = [-logprobs[i, token].item() for i, token in enumerate(ids)]
    (first, second) = score_documents(llm, [text])[0]
    within = sum(end <= PASSAGE for end in ends)
    assert (first.tokens, second.tokens) == (within, len(ids) - within)
    assert (first.nats, second.nats) == pytest.approx((sum(losses[:within]), sum(losses[within:])), rel=1e-5)
    (whole,) = score_documents(llm, [text[:-1]])[0]  # a shorter rest belongs to the passage before
    assert (whole.text, whole.tokens) == (text[:-1], len(llm.tokenizer.encode(text[:-1], bos=False)))


def test_a_bos_that_the_text_spells_is_a_token_of_the_text(llm):
    (passages,) = score_documents(llm, ["<s>" + STORY])
    assert sum(passage.tokens for passage in passages) == len(llm.tokenizer.encode(STORY, bos=False)) + 1


def test_a_model_without_bos_reads_its_end_token_first(tmp_path):
    folder = models.save(models.make(bos_token_id=None, eos_token_id=2), tmp_path, bos=False)
    llm = LLM(folder, device="cpu", dtype="float32")
    assert llm.tokenizer.bos_id is None and llm.tokenizer.start_id == 2
    (passages,) = score_documents(llm, ["w5 w6"])
    logprobs = llm.logits([2, 5, 6]).double().log_softmax(-1)
    assert passages[0].nats == pytest.approx(-(logprobs[0, 5] + logprobs[1, 6]).item(), rel=1e-5)


def test_a_model_with_neither_is_refused(tmp_path):
    folder = models.save(models.make(bos_token_id=None), tmp_path, bos=False)
    with pytest.raises(ValueError, match="names neither a BOS nor an end token"):
        score_documents(LLM(folder, device="cpu", dtype="float32"), ["w5 w6"])


@pytest.mark.parametrize(
    ("window", "stride", "says"),
    [
        (1, None, "window must be from 2 to 512 tokens .*got 1"), (513, None, "window must be from 2 to 512.*got 513"),
        (64, 64, "stride must be from 1 to 63 tokens .*got 64"), (64, 0, "stride must be from 1 to 63.*got 0"),
    ],
)  # fmt: skip
def test_windows_that_do_not_fit_are_refused(llm, window, stride, says):
    with pytest.raises(ValueError, match=says):
        score_documents(llm, ["a"], Windows(window=window, stride=stride))


@pytest.mark.parametrize("documents", [[], [""], ["a", ""]])
def test_an_empty_text_is_refused(llm, documents):
    with pytest.raises(ValueError, match="must not be empty"):
        score_documents(llm, documents)


def test_few_sequences_are_held_at_a_time(llm):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield [0, 5, 6], 2

    found = likelihoods(llm, endless())
    assert [len(next(found).logprobs) for _ in range(3)] == [2, 2, 2]
    assert taken == BATCH


def test_progress_reaches_the_end(llm):
    told = []
    score_documents(llm, ["a b", STORY], progress=lambda *at: told.append(at))
    assert told == sorted(told) and told[-1] == (len("a b") + len(STORY),) * 2


def test_xz_is_lzma_and_knows_the_training_text():
    training = "\n".join(each.text for each in stories.write_documents("story", 100, seed=1))
    alone, after = xz_baselines([STORY, STORY], training)
    text = (STORY * 2).encode()
    assert alone.value == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert after.value < alone.value / 1.5
    assert [each.name for each in xz_baselines([STORY])] == ["xz -9"]


def test_the_embedded_model_beats_xz_on_its_own_stories(llm):
    answers = story_texts(limit=5).run(llm)
    nats, _, count = (
        sum(column) for column in zip(*(e.statistics["perplexity"] for e in answers.examples), strict=True)
    )
    assert nats / math.log(2) / count < answers.baselines[1].value / 3
