"""The text of a page: its main text by trafilatura where that is installed, else all that is no markup, menu or script."""

import re
from html.parser import HTMLParser
from importlib.util import find_spec

from ..documents import Document, Removed

# not "head" nor "form": the end of a head may be left out, and some servers put all of a page into one form
_LEFT_OUT = frozenset({"script", "style", "noscript", "template", "svg", "nav", "header", "footer", "aside", "button", "select", "title"})  # fmt: skip
_BLOCKS = frozenset({"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "blockquote", "pre", "table", "ul", "ol", "dt", "dd", "hr"})  # fmt: skip


def html(document: Document) -> Document | Removed:
    """Of documents read from pages; others stay as they are."""
    if document.metadata.get("format") != "html":
        return document
    text = main_text(document.text)
    if not text:
        return Removed("page without text")
    document.text = text
    del document.metadata["format"]
    return document


def main_text(page: str) -> str:
    """The text of a page, with a line for each block. Empty if nothing is found."""
    if find_spec("trafilatura"):
        import trafilatura

        try:
            return trafilatura.extract(page, include_comments=False, deduplicate=False, favor_precision=True) or ""
        except Exception:  # lxml refuses some input with errors of many kinds; a page of the web is no reason to stop
            pass
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(parser.pieces).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _LEFT_OUT:
            self._inside.append(tag)
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:  # what was left open inside ends with it
            del self._inside[self._inside.index(tag) :]
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.pieces.append(data.replace("\n", " "))
