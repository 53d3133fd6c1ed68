"""Changes of text that remove no document: Unicode, pages of HTML, boilerplate, lines that repeat."""

import re

import ftfy
from datatrove.pipeline.filters.c4_filters import POLICY_SUBSTRINGS

from ..documents import Document

# uncurl_quotes and fix_character_width would change how people write, not how machines broke it: ，！ are no wide ASCII
_REPAIRS = ftfy.TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization="NFC"
)
# C0 and C1 but tab and line feed, zero-width space, word joiner, byte order mark; not the joiners that scripts are written with
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufff9-\ufffb]")
_SPACES = re.compile(r"[ \t\u00a0]+(?=\n|$)")
_EMPTY_LINES = re.compile(r"\n{3,}")

_BUTTONS = re.compile(
    r"(?:share (?:this|on|via)\b.*|tweet|skip to (?:main )?content|click here\b.*|read more\W*|back to top|print this page|"
    r"log ?in|sign (?:in|up)\b.*|subscribe\b.*newsletter.*|all rights reserved\W*|(?:©|\(c\)|copyright)\W*\d{4}\b.*)\W*",
    re.IGNORECASE,
)


def unicode(document: Document) -> Document:
    """NFC; text that was decoded with the wrong encoding is repaired; control characters and spaces at the ends of lines go."""
    text = ftfy.fix_text(document.text, _REPAIRS).replace("\r\n", "\n").replace("\r", "\n")
    text = _SPACES.sub("", _CONTROL.sub("", text))
    document.text = _EMPTY_LINES.sub("\n\n", text).strip("\n")
    return document


def boilerplate(document: Document) -> Document:
    """Lines of cookie banners and privacy notes (C4's phrases, in lines below 200 characters) and of buttons go."""
    document.text = "\n".join(line for line in document.text.split("\n") if not _is_boilerplate(line.strip()))
    return document


def _is_boilerplate(line: str) -> bool:
    if not line or len(line) >= 200:
        return False
    lower = line.lower()
    return any(phrase in lower for phrase in POLICY_SUBSTRINGS) or _BUTTONS.fullmatch(line) is not None


def repeated_lines(document: Document) -> Document:
    """A line that stands three times or more in a row, with or without empty lines between, stands once; twice may be verse."""
    kept: list[str] = []
    run: list[str] = []

    def end_run() -> None:
        copies = sum(1 for line in run if line.strip())
        kept.extend(run if copies < 3 else run[:1])
        run.clear()

    for line in document.text.split("\n"):
        if run and line.strip() and line != run[0]:
            end_run()
        if run or line.strip():
            run.append(line)
        else:
            kept.append(line)
    end_run()
    document.text = "\n".join(kept)
    return document
