"""Cutting texts: nothing lost, nothing too long, and sentences whole where they can be."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.engine import EMBEDDED_MODEL
from llama_fast.tasks.pieces import pieces, whole_sentences

TOKENIZER = Tokenizer(EMBEDDED_MODEL)
SENTENCE = "The fox sat by the old river and saw a bird. "


def tokens(text: str) -> int:
    return len(TOKENIZER.encode(text, bos=False))


@given(st.text(max_size=400), st.integers(32, 80))
def test_all_of_a_text_in_order_and_no_piece_too_long(text, room):
    found = pieces(TOKENIZER, text, room)
    assert "".join(found) == text
    assert all(found) or text == ""
    assert all(tokens(piece) <= room + 8 for piece in found), "what a prompt leaves room for beside"


@given(st.text(alphabet="ab .!?\n。é🦙", max_size=600), st.integers(32, 60))
def test_overlapping_pieces_begin_with_what_the_last_ends_with(text, room):
    found = pieces(TOKENIZER, text, room, overlap=room // 4)
    place = 0
    for piece, following in itertools.pairwise(found):
        assert text.startswith(piece, place)
        ends = place + len(piece)
        place = text.index(following, place + 1) if following else ends
        assert place <= ends, "nothing between two pieces is left out"
    assert text.endswith(found[-1])


def test_cuts_are_at_the_ends_of_sentences():
    found = pieces(TOKENIZER, SENTENCE * 20, 60)
    assert len(found) > 3 and all(piece.startswith("The fox") and piece.endswith("bird. ") for piece in found)
    assert 60 - tokens(SENTENCE) < tokens(found[0]) <= 60
    count = sum(len(piece) for piece in pieces(TOKENIZER, SENTENCE * 20, 60, overlap=20)) - len(SENTENCE * 20)
    assert count > 0 and count % len(SENTENCE) == 0, "whole sentences stand in two windows"


def test_where_no_sentence_ends_a_word_does():
    words = pieces(TOKENIZER, "river bird " * 80, 40)
    assert len(words) > 2 and all(piece.endswith(" ") for piece in words)
    letters = pieces(TOKENIZER, "x" * 500, 40)
    assert "".join(letters) == "x" * 500 and max(map(tokens, [*words, *letters])) <= 41


def test_no_room_is_an_error_only_for_a_text_that_does_not_fit():
    assert pieces(TOKENIZER, "a", 1) == ["a"]
    with pytest.raises(ValueError, match="leave its parts 31 tokens; they need 32"):
        pieces(TOKENIZER, SENTENCE * 9, 31)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two. Thr", "One. Two."), ('He said "Go!" Then he', 'He said "Go!"'), ("Only half a", "Only half a"),
        ("Version 3.11 is", "Version 3.11 is"), ("一。二。三", "一。二。"), ("One.", "One."), ("", ""),
    ],
)  # fmt: skip
def test_whole_sentences(text, whole):
    assert whole_sentences(text) == whole
