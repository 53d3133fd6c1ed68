"""Lines that two editions of a play have in common, though they spell them differently."""

import re
from collections.abc import Iterator, Sequence

from rapidfuzz import fuzz, process

LEAST_RATIO = 88
"""Of 100. Below it, lines begin to differ in words: "Fooles had nere lesse grace in a yeere" and its modern form have 88.2."""
LEAST_LETTERS = 12
"""Shorter lines ("Enter King", "My good Lord") have doubles nearby."""
BEHIND, AHEAD, GROWTH = 20, 40, 4
"""How many lines around the place reached are looked at, and by how many the window grows ahead for each line without a partner.

The Folio lacks long passages of Hamlet and King Lear: with a growth of 1 the pairs of both ended there, and 1,747 were lost."""

_SPEAKER = re.compile(r"^\s+(?:[A-Z1-9][\w.'&]*\s?){1,3}?\.\s+(?=\S)")  # "  King. ", "   2.Mur. "
_DIRECTION = re.compile(r"\[[^\]]*\]")
_OLD_LETTERS = str.maketrans("vj", "ui")


def old_lines(text: str) -> list[str]:
    """The lines of a play in the First Folio, without the speakers' names, which stand indented before their words."""
    return [_SPEAKER.sub("", line).strip() for line in text.split("\n")]


def modern_lines(text: str) -> list[str]:
    """The lines of a play in a modern edition, without stage directions."""
    return [line.strip() for line in _DIRECTION.sub("", text).split("\n")]


def match_lines(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of an old line and the new one that is most like it near the place reached, each new line once at most."""
    keyed = [(line, key) for line in new if len(key := letters(line)) >= LEAST_LETTERS]
    keys = [key for _, key in keyed]
    taken: set[int] = set()
    reached = alone = 0
    for line in old:
        key = letters(line)
        if len(key) < LEAST_LETTERS:
            continue
        first = max(0, reached - BEHIND)
        near = keys[first : reached + AHEAD + GROWTH * alone]
        found = process.extractOne(key, near, scorer=fuzz.ratio, score_cutoff=LEAST_RATIO)
        if found is None:
            alone += 1
            continue
        partner = first + found[2]
        reached, alone = partner + 1, 0
        if partner not in taken:
            taken.add(partner)
            yield line, keyed[partner][0]


def letters(line: str) -> str:
    """What is compared: letters alone, v as u and j as i, as printers of 1623 used them."""
    return re.sub(r"[^a-z]", "", line.lower().translate(_OLD_LETTERS))
