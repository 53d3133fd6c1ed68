"""Text that comes a token at a time: the same text for every cut between prompt and completion, and for every kind of tokenizer."""

import os.path
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_fast
from llama_fast.decoder.detokenizer import DetokenizedStream
from llama_fast.decoder.tokenizer import Tokenizer
from tests.decoder.made_tokenizers import MADE, SAMPLES, byte_level, llama2, word_level, write

EMBEDDED = Path(llama_fast.__file__).parent / "demo_model"
KINDS = MADE | {"words": word_level}
REPLACEMENT = "\ufffd"
TEXTS = st.text("a <▁n\nกไท你가é🦙👩\u200d" + "owl", max_size=9)


@pytest.fixture(scope="module", params=[*KINDS, "embedded"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "embedded":
        return Tokenizer(EMBEDDED)
    return Tokenizer(write(tmp_path_factory.mktemp("tokenizer"), KINDS[request.param]()))


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory) -> Tokenizer:
    return Tokenizer(write(tmp_path_factory.mktemp("llama-2"), llama2()))


def streamed(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] = (), skip_special: bool = True) -> list[str]:
    stream = DetokenizedStream(tokenizer, prompt_ids, skip_special=skip_special)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def added_text(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int], skip_special: bool = True) -> str:
    """What `ids` add to the text of the prompt, by the definition."""
    before, whole = (tokenizer.decode(some, skip_special) for some in (prompt_ids, [*prompt_ids, *ids]))
    return whole[len(os.path.commonprefix([before, whole])) :]  # noqa: RUF071 (texts, no paths)


@settings(max_examples=30)
@given(text=TEXTS)
def test_a_text_cut_at_any_token_goes_on_where_the_prompt_ends(tokenizer, text) -> None:
    """Also within a character: it belongs to the completion, and no U+FFFD is ever shown of it."""
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        pieces = streamed(tokenizer, ids[cut:], ids[:cut])
        assert tokenizer.decode(ids[:cut]).rstrip(REPLACEMENT) + "".join(pieces) == whole
        assert not any(REPLACEMENT in piece for piece in pieces)


def any_tokens(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    known = [*tokenizer.encode("🦙 two  owls ไท 你"), tokenizer.eos_ids[0]]
    token = st.integers(0, tokenizer.vocab_size + 3) | st.sampled_from(known)  # a model may have more tokens
    if tokenizer.byte_ids:
        token |= st.sampled_from([3 + byte for byte in b"\xe0\xb8\x81\xf0\x9f\xa6\x99\xc3\xed\xffA "])
    return st.lists(token, max_size=24)


@given(data=st.data())
def test_any_tokens_add_what_decoding_them_adds(tokenizer, data) -> None:
    prompt, ids = data.draw(any_tokens(tokenizer)), data.draw(any_tokens(tokenizer))
    skip = data.draw(st.booleans())
    assert "".join(streamed(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip)
    assert "".join(streamed(tokenizer, ids, prompt, skip)) == added_text(tokenizer, ids, prompt, skip)


def test_text_comes_without_delay(tokenizer) -> None:
    """Each character with its last token."""
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        stream = DetokenizedStream(tokenizer)
        given = ""
        for i, token_id in enumerate(ids):
            given += stream.push(token_id)
            assert given == tokenizer.decode(ids[: i + 1]).rstrip(REPLACEMENT)
        assert stream.flush() == ""


def test_text_after_bos_alone_starts_like_a_text(tokenizer) -> None:
    bos, *ids = tokenizer.encode("owl")
    assert "".join(streamed(tokenizer, ids, [bos])) == tokenizer.decode(ids)


def test_a_character_comes_whole_with_its_last_byte(tmp_path) -> None:
    ours = Tokenizer(write(tmp_path, byte_level()))
    ids = ours.encode("🦙a")[1:]
    assert len(ids) == 5
    assert streamed(ours, ids) == ["", "", "", "🦙", "a", ""]
    assert streamed(ours, ids[:2]) == ["", "", "\ufffd"]
    assert streamed(ours, ids[2:], ids[:2]) == ["", "🦙", "a", ""]


def test_bytes_that_fall_back_come_a_character_at_a_time(llama_2) -> None:
    ids = llama_2.encode("aไท")[-6:]
    assert set(ids) <= llama_2.byte_ids
    assert streamed(llama_2, ids) == ["", "", "ไ", "", "", "ท", ""]
    assert streamed(llama_2, ids[:-1]) == ["", "", "ไ", "", "", "\ufffd\ufffd"]
    assert streamed(llama_2, ids[1:], ids[:1]) == ["", "ไ", "", "", "ท", ""]


def test_what_the_prompt_left_broken_is_the_prompts(llama_2, tmp_path) -> None:
    """Its U+FFFD stands in the text of the prompt already; a completion of no tokens has no text."""
    a = llama_2.encode("a")[-1:]
    half = [3 + 0xF0, 3 + 0x9F]
    assert llama_2.decode(half) == "\ufffd\ufffd"
    assert "".join(streamed(llama_2, a, half)) == "a"
    assert "".join(streamed(llama_2, [3 + 0xA6, *a], half)) == "\ufffda"
    assert streamed(llama_2, [], half) == [""]
    ours = Tokenizer(write(tmp_path, byte_level()))
    half = ours.encode("🦙")[1:3]
    assert "".join(streamed(ours, ours.encode("a")[1:], half)) == "a" and streamed(ours, [], half) == [""]


def test_a_long_prompt_that_ends_in_a_run_of_bytes(llama_2) -> None:
    """Whatever its length is: a window of it would begin inside a character."""
    for length in (1, 5, 6, 7, 16, 30):
        ids = llama_2.encode("ภ" * length + "x")
        for cut in range(2, len(ids)):
            whole = llama_2.decode(ids[:cut]).rstrip(REPLACEMENT) + "".join(streamed(llama_2, ids[cut:], ids[:cut]))
            assert whole == "ภ" * length + "x"


@pytest.mark.parametrize("text", ["ภ" * 300, "owl " * 100, "\ufffd" * 200])
def test_a_step_decodes_few_tokens(tokenizer, text, monkeypatch) -> None:
    """However long a text, a prompt, a run of bytes or of wrong bytes is: the cost of a text grows with its length."""
    ids = tokenizer.encode(text)
    ids += ids[-2:-1] * 50  # bytes that are no character, where the text ends in bytes
    decoded = []
    decode = tokenizer.decode

    def watched(some, *args, **kwargs) -> str:
        decoded.append(len(some))
        return decode(some, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "decode", watched)
    streamed(tokenizer, ids, ids)
    assert max(decoded) <= 5 and len(decoded) <= 2 * len(ids) + 2
