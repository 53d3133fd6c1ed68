"""The text of completions: where it begins and ends, what stopped it, and models without a tokenizer."""

import json
import os.path

import numpy
import pytest

from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.engine.completion import Completion
from llama_fast.engine.sampling_params import SamplingParams
from tests.decoder.made_tokenizers import byte_level, llama2, write
from tests.decoder.models import llama_tokens, make, random_ids, save
from tests.engine.engines import assert_nothing_left, engine
from tests.parity import not_interpreted

pytestmark = not_interpreted

PROMPT = random_ids(12)


def greedy(max_tokens=20, **options):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)


def word(token_id: int) -> str:
    return f" w{token_id}"


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    """What PROMPT gets greedily, by transformers; the first eight differ."""
    tokens = llama_tokens(tuple(PROMPT), 20)
    assert len(set(tokens[:8])) == 8
    return tokens


@pytest.fixture(scope="module")
def spelled(tokens) -> str:
    return "".join(map(word, tokens))


@pytest.fixture(params=[False, True], ids=["read at once", "read late"])
def llm(request, folder):
    llm = engine(folder("llama"), read_late=request.param, block_size=4)
    yield llm
    assert_nothing_left(llm)


def complete(llm, params, prompt=PROMPT) -> Completion:
    """The completion, which streams the text that it has."""
    *pieces, last = llm.stream(prompt, params)
    assert "".join(piece.text for piece in [*pieces, last]) == last.completion.text
    assert llm.generate(prompt, params)[0] == last.completion
    return last.completion


# --- ends ------------------------------------------------------------------------------------------------------------


def test_the_stop_string_that_is_complete_first(llm, tokens, spelled):
    """Though another begins earlier, and comes first in the list."""
    longer, shorter = spelled[: len(spelled) // 2], word(tokens[1])
    for stops in ([longer, shorter], [shorter, longer], [longer, "never", shorter]):
        completion = complete(llm, greedy(stop=stops))
        assert completion.text == word(tokens[0]) and completion.stop_reason == shorter
        assert completion.token_ids == tokens[:2] and completion.finish_reason == "stop"


def test_stop_strings_that_end_together(llm, tokens):
    both = word(tokens[0]) + word(tokens[1])
    assert complete(llm, greedy(stop=[both, word(tokens[1])])).text == ""
    completion = complete(llm, greedy(stop=[word(tokens[1]), both]))
    assert completion.text == word(tokens[0]) and completion.stop_reason == word(tokens[1])


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 8])
def test_no_stop_string_ends_in_the_first_tokens(llm, tokens, spelled, min_tokens):
    """`min_tokens=3` stops nothing that the third token completes."""
    completion = complete(llm, greedy(8, stop=word(tokens[2]), min_tokens=min_tokens))
    ends = min_tokens < 3
    assert completion.token_ids == tokens[: 3 if ends else 8]
    assert completion.text == "".join(map(word, tokens[: 2 if ends else 8]))
    assert completion.stop_reason == (word(tokens[2]) if ends else None)


def test_a_stop_string_may_begin_in_the_first_tokens(llm, tokens):
    across = word(tokens[2])[1:] + word(tokens[3])[:2]
    completion = complete(llm, greedy(8, stop=across, min_tokens=3))
    assert completion.text == "".join(map(word, tokens[:2])) + " " and completion.stop_reason == across
    assert completion.token_ids == tokens[:4]
    assert complete(llm, greedy(8, stop=across, min_tokens=4)).token_ids == tokens[:8]


def test_what_ended_the_text_included(llm, tokens, spelled):
    stop = spelled[3:9]
    completion = complete(llm, greedy(stop=stop, include_stop_str_in_output=True))
    assert completion.text == spelled[:9] and completion.stop_reason == stop
    by_id = complete(llm, greedy(stop_token_ids=[tokens[2]], include_stop_str_in_output=True))
    assert by_id.text == "".join(map(word, tokens[:3])) and by_id.stop_reason == tokens[2]
    # the text of the stop token completes a stop string, which is what the text ends with
    both = complete(llm, greedy(stop_token_ids=[tokens[2]], stop="w", include_stop_str_in_output=True, min_tokens=2))
    assert both.text == "".join(map(word, tokens[:2])) + " w" and both.stop_reason == "w"


def test_reasons(tmp_path, tokens):
    """Of a stop token its id, of the model's own end token and of the length none."""
    llm = engine(save(make(eos_token_id=tokens[4]), tmp_path))
    own, ignored, stop, both, length = llm.generate(
        [PROMPT] * 5,
        [
            greedy(),
            greedy(ignore_eos=True, stop_token_ids=[tokens[4]]),
            greedy(stop_token_ids=[tokens[2], tokens[4]]),
            greedy(stop_token_ids=[tokens[4]]),
            greedy(3),
        ],
    )
    assert [c.finish_reason for c in (own, ignored, stop, both, length)] == ["stop"] * 4 + ["length"]
    assert [c.stop_reason for c in (own, ignored, stop, both, length)] == [None, tokens[4], tokens[2], None, None]
    included = llm.generate(PROMPT, greedy(include_stop_str_in_output=True))[0]
    assert included.text == "".join(map(word, tokens[:5])) and included.stop_reason is None
    request = llm.submit(PROMPT, greedy())
    llm.cancel(request)
    assert request.completion.stop_reason is None


# --- tokens that give no text ----------------------------------------------------------------------------------------


def test_special_tokens_in_the_text(tmp_path, tokens, spelled):
    folder = save(make(), tmp_path)
    special = {"content": word(tokens[1]).strip(), "special": True, "normalized": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(tokens[1]): special}}))
    llm = engine(folder)
    without = "".join(word(i) for i in tokens if i != tokens[1])
    assert complete(llm, greedy()).text == without != spelled
    assert complete(llm, greedy(skip_special_tokens=False)).text == spelled
    stop = greedy(stop=word(tokens[1]), skip_special_tokens=False)
    assert complete(llm, stop).text == word(tokens[0])


def test_no_text_where_none_is_asked_for(llm, tokens, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", None)
    completion = complete(llm, greedy(detokenize=False))
    assert completion.text == "" and completion.token_ids == tokens
    completion = complete(llm, greedy(detokenize=False, stop_token_ids=[tokens[2]], include_stop_str_in_output=True))
    assert completion.text == "" and completion.stop_reason == tokens[2]


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "skip_special_tokens", "detokenize"])
@pytest.mark.parametrize("value", [None, 1, "no", numpy.array([True])], ids=repr)
def test_what_is_no_switch(name, value):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got"):
        SamplingParams(**{name: value})


def test_stop_strings_need_a_text():
    with pytest.raises(ValueError, match=r"stop must not be given with detokenize=False.*got \('x',\)"):
        SamplingParams(stop="x", detokenize=False)
    assert SamplingParams(stop=[], detokenize=False, stop_token_ids=[3]).detokenize is False


# --- characters of several tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [llama2, byte_level])
def test_a_prompt_may_end_inside_a_character(kind, tmp_path):
    """The completion begins with the whole character; whatever the model says, what is streamed is the text."""
    folder = write(save(make(vocab_size=kind().get_vocab_size()), tmp_path), kind())
    llm = engine(folder)
    ids = llm.tokenizer.encode("owl 🦙")
    assert complete(llm, greedy(1, allowed_token_ids=ids[-1:]), ids[:-1]).text == "🦙"
    parts = sorted(set(llm.tokenizer.encode("aไ🦙é")[1:]))
    texts = ""
    for cut in range(len(ids) - 4, len(ids)):
        drawn = SamplingParams(seed=cut, temperature=200.0, max_tokens=40, allowed_token_ids=parts)
        completion = complete(llm, drawn, ids[:cut])
        before, whole = (llm.tokenizer.decode(some) for some in (ids[:cut], ids[:cut] + completion.token_ids))
        assert completion.text == whole[len(os.path.commonprefix([before, whole])) :]  # noqa: RUF071 (no paths)
        texts += completion.text
    assert set(texts) & set("aไ🦙é")


def test_no_tokens_have_no_text(tmp_path):
    """Though the prompt ends inside a character."""
    llm = engine(write(save(make(vocab_size=llama2().get_vocab_size()), tmp_path), llama2()))
    completion = complete(llm, greedy(0), llm.tokenizer.encode("🦙")[:-1])
    assert completion.text == "" and completion.token_ids == []


# --- no tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def untold(tmp_path, tokens):
    """The model, which ends at the fifth token, in a folder without a tokenizer."""
    folder = save(make(eos_token_id=tokens[4]), tmp_path)
    (folder / "tokenizer.json").unlink()
    llm = engine(folder)
    yield llm
    assert_nothing_left(llm)


def test_token_ids_need_no_tokenizer(untold, tokens):
    assert complete(untold, greedy()).token_ids == tokens[:5]
    completion = complete(untold, greedy(ignore_eos=True, min_tokens=5, n=1))
    assert completion.token_ids == tokens and completion.text == ""
    assert complete(untold, greedy(detokenize=False, stop_token_ids=[tokens[2]])).stop_reason == tokens[2]


def test_log_probabilities_without_a_tokenizer_have_no_texts(untold, tokens):
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=2)
    for entry in untold.generate([tokens], params)[0].logprobs:
        assert len(entry.top) == 2 and set(entry.texts.values()) == {""}


def test_text_needs_a_tokenizer(untold):
    for ask in (
        lambda: untold.generate("text"),
        lambda: untold.generate([PROMPT, "text"]),
        lambda: untold.generate(PROMPT, greedy(stop="x")),
        lambda: untold.chat([{"role": "user", "content": "text"}]),
        lambda: untold.tokenizer,
    ):
        with pytest.raises(ValueError, match=r"has no tokenizer\.json: copy it"):
            ask()


def test_a_broken_tokenizer_is_told_at_once(tmp_path):
    folder = save(make(), tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        engine(folder)
