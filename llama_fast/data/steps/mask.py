"""What names a person's accounts is replaced by a word in angle brackets: e-mail addresses, phone and card numbers."""

import re
from collections.abc import Callable, Sequence

from ..config import Mask
from ..documents import Document

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b")
# with a country code; or three groups, the first perhaps in brackets, so that years, dates and ISBNs stay
_PHONE = re.compile(
    r"(?<![\w+])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{2,5}\)[ .-]?\d{3,4}[ .-]?\d{3,4}|\d{3}([ .-])\d{3}\1\d{4})(?![\w-]*\d)"
)
_CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])")


def _card(match: re.Match[str]) -> str:
    digits = re.sub(r"\D", "", match[0])
    return "<card>" if luhn(digits) and len(set(digits)) > 1 else match[0]


def luhn(digits: str) -> bool:
    """Luhn's check of card numbers, which 9 of 10 other numbers fail."""
    values = [int(digit) for digit in reversed(digits)]
    return (sum(values[::2]) + sum(sum(divmod(2 * value, 10)) for value in values[1::2])) % 10 == 0


def _phone(match: re.Match[str]) -> str:
    return "<phone>" if 7 <= sum(c.isdigit() for c in match[0]) <= 15 else match[0]


# cards go before phones: parts of a card's number look like one
_MASKS: dict[Mask, tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = {
    "email": (_EMAIL, lambda _: "<email>"),
    "card": (_CARD, _card),
    "phone": (_PHONE, _phone),
}


def masking(kinds: Sequence[Mask]) -> Callable[[Document], Document]:
    """A step that masks these kinds, and counts them in the document's metadata under "masked"."""
    chosen = [(kind, *_MASKS[kind]) for kind in _MASKS if kind in kinds]

    def mask(document: Document) -> Document:
        counts = {}
        for kind, pattern, replacement in chosen:
            word = f"<{kind}>"
            before = document.text.count(word)
            document.text = pattern.sub(replacement, document.text)
            if found := document.text.count(word) - before:
                counts[kind] = found
        if counts:
            document.metadata["masked"] = counts
        return document

    return mask
