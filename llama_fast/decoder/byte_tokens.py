"""Byte fallback: tokens that are one byte each, `<0xE2>`, for characters that a vocabulary lacks.

A run of them is read as sentencepiece reads it, character by character: a byte that is part of none becomes one U+FFFD. The
tokenizers library makes U+FFFD of every byte of a run that has one wrong or missing byte, and a text that ends inside a character,
as one does that is cut at its last token, would lose all of its last run.
"""

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

_HEX = "0123456789ABCDEFabcdef"
_VALUES = {f"<0x{high}{low}>": int(high + low, 16) for high in _HEX for low in _HEX}
_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_STRAY = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is part of no character


def is_byte_token(token: str) -> bool:
    return token in _VALUES


def whole_characters(tokens: Iterable[str]) -> Iterator[str]:
    """The tokens, where bytes that are part of no character have made way for those of U+FFFD: every run is UTF-8."""
    for is_bytes, run in itertools.groupby(tokens, is_byte_token):
        if is_bytes:
            text = _STRAY.sub("\ufffd", _bytes(run).decode(errors="surrogateescape"))
            yield from (_TOKENS[byte] for byte in text.encode())
        else:
            yield from run


def unfinished(tokens: Sequence[str]) -> int:
    """How many tokens at the end are the beginning of a character."""
    run = list(itertools.takewhile(is_byte_token, reversed(tokens)))
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    decoder.decode(_bytes(reversed(run)))
    return len(decoder.getstate()[0])


def _bytes(tokens: Iterable[str]) -> bytes:
    return bytes(_VALUES[token] for token in tokens)
