"""Cuts a text that is too long into pieces: where a sentence ends; else where a word ends; else where a token does."""

import re
from bisect import bisect_left, bisect_right

from ..decoder.tokenizer import Tokenizer

LEAST_ROOM = 32

_CLOSING = r"[\"'”’»)\]]*"
_SENTENCE_END = re.compile(rf"(?<=[.!?…]){_CLOSING}\s+|(?<=[。！？]){_CLOSING}\s*|\n+")
_LAST_SENTENCE = re.compile(rf".*(?:[.!?…](?={_CLOSING}(?:\s|$))|[。！？]){_CLOSING}", re.DOTALL)
_WORD_END = re.compile(r"\s+")


def pieces(tokenizer: Tokenizer, text: str, room: int, *, overlap: int = 0) -> list[str]:
    """The text in order, cut into as few pieces as hold whole sentences, of at most `room` tokens each.

    Joined they are the text, unless each begins with up to `overlap` tokens, in whole sentences, that the one before ends with.

    Raises:
        ValueError: the text has more than `room` tokens, which are too few for a piece that says anything.
    """
    _, ends = tokenizer.encode_with_ends(text)
    if len(ends) <= room:
        return [text]
    if room < LEAST_ROOM:
        raise ValueError(
            f"a text of {len(ends)} tokens is longer than the context, whose prompt and output leave its parts {max(0, room)} tokens; "
            f"they need {LEAST_ROOM}: give a shorter prompt, or a lower max_tokens"
        )
    sentences = [match.end() for match in _SENTENCE_END.finditer(text)]
    words = [match.end() for match in _WORD_END.finditer(text)]

    def tokens_before(position: int) -> int:
        return bisect_right(ends, position)

    cut: list[str] = []
    start = 0
    while True:
        last = tokens_before(start) + room - 1
        if last >= len(ends) - 1:
            return [*cut, text[start:]]
        end = _last(sentences, start, ends[last]) or _last(words, start, ends[last]) or ends[last]
        cut.append(text[start:end])
        first = tokens_before(end) - overlap
        again = bisect_left(sentences, ends[first - 1]) if first > 0 else len(sentences)
        start = sentences[again] if overlap and again < len(sentences) and start < sentences[again] < end else end


def whole_sentences(text: str) -> str:
    """Without the sentence that an output was cut off in, unless there is no other."""
    match = _LAST_SENTENCE.match(text)
    return match[0] if match else text


def _last(positions: list[int], after: int, until: int) -> int | None:
    """The last of some positions in a range."""
    i = bisect_right(positions, until) - 1
    return positions[i] if i >= 0 and positions[i] > after else None
