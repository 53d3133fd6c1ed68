"""Words of a text in any script, for scores that count them."""

import unicodedata
from functools import cache

_ALONE = ("CJK UNIFIED", "CJK COMPATIBILITY", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA")


def words(text: str) -> list[str]:
    """Runs of letters, digits and the marks on them, in lower case; each Chinese character and each kana is a word.

    On ASCII it is what rouge-score's own tokenizer gives. Compatibility forms are equal to what they stand for (full-width letters, half-width kana).
    """
    normal = unicodedata.normalize("NFKC", text).lower()
    return "".join(_spaced(char) for char in normal).split()


def apart(text: str) -> str:
    """The text with spaces around each Chinese character and kana, which are written without."""
    return "".join(_spaced(char) if _stands_alone(char) else char for char in text)


def is_punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] == "P"


@cache  # at most as many as Unicode has
def _spaced(char: str) -> str:
    if unicodedata.category(char)[0] not in "LNM":
        return " "
    return f" {char} " if _stands_alone(char) else char


@cache
def _stands_alone(char: str) -> bool:
    return unicodedata.category(char)[0] == "L" and unicodedata.name(char, "").startswith(_ALONE)
