"""The performance page as one HTML file that needs nothing else: no network, no script, its pictures inside."""

import base64
import re
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from llama_fast.reports.pages import templates


def html_page(markdown: Path) -> str:
    """A page that `write_report` has written, as HTML. It stands as it is in the Markdown, where what files say is escaped.

    Raises:
        OSError: it, or one of its pictures, cannot be read.
    """
    parser: Any = MarkdownIt("commonmark", {"html": True}).enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown.read_text(encoding="utf-8"))
    title, *headings = [
        (token, tokens[i + 1].content) for i, token in enumerate(tokens) if token.type == "heading_open"
    ]
    contents = []
    for token, text in headings:
        token.attrSet("id", re.sub(r"[^\w]+", "-", text.lower()).strip("-"))
        contents.append((token.tag, token.attrGet("id"), text.partition(",")[0] if token.tag == "h3" else text))
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        image.attrSet("src", _inside(markdown.parent / str(image.attrGet("src"))))
    del tokens[:3]  # the title, which the header has
    template = templates("llama_fast.benchmarks.report").get_template("bench.html.jinja")
    return template.render(title=title[1], contents=contents, body=parser.renderer.render(tokens, parser.options, {}))


def _inside(picture: Path) -> str:
    """A picture as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(picture.read_bytes()).decode()
