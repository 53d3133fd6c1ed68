"""Changes of text: what machines broke is mended, what people wrote stays."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from llama_fast.data.documents import Document, Removed
from llama_fast.data.steps import clean, html
from llama_fast.data.steps.html import main_text
from llama_fast.data.steps.mask import luhn, masking
from llama_fast.data.steps.words import WORDS, separates_words


def changed(function, text, **metadata):
    result = function(Document(text, "d", metadata=metadata))
    return result if isinstance(result, Removed) else result.text


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("The café has its own way.".encode().decode("cp1252"), "The café has its own way."),
        ("cafe\u0301", "caf\u00e9"),
        ("a\x00b\x07c\ufeffd\u200be", "abcde"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("end of line  \t\nnext", "end of line\nnext"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
    ],
)
def test_unicode_is_mended(broken, mended):
    assert changed(clean.unicode, broken) == mended


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界！（全角标点）「引号」～", "日本語のテキスト、カタカナ・ｶﾀｶﾅ。", "“Curly” — it’s fine…", "1 &lt; 2 &amp; so on", "ﬁne",
        "क्षेत्र में", "👩‍👩‍👧 family", "می‌خواهم",
    ],
)  # fmt: skip
def test_unicode_leaves_alone_what_people_write(text):
    assert changed(clean.unicode, text) == text


def test_boilerplate_goes_and_prose_about_it_stays():
    page = "A story of note.\nThis site uses cookies. Accept?\nShare on Facebook\nShe baked cookies.\nRead more »\n© 2021 Someone Ltd."
    assert changed(clean.boilerplate, page) == "A story of note.\nShe baked cookies."
    long = "In this essay the terms of use of a public library are compared with those of a private one. " * 3
    assert changed(clean.boilerplate, long) == long


def test_lines_three_times_in_a_row_stand_once():
    assert changed(clean.repeated_lines, "a\nspam\nspam\n\nspam\nb") == "a\nspam\nb"
    verse = "Never, never!\nNever, never!\nO.\nNever, never!\n\n\nEnd"
    assert changed(clean.repeated_lines, verse) == verse
    assert changed(clean.repeated_lines, "a\na\na") == "a"


PAGE = """<html><head><title>T</title><style>p {color: red}</style><script>var x = "<p>no</p>";</script></head><body>
<nav><a href="/">Home</a><a href="/b">Shop</a></nav><article><h1>The river</h1><p>The river rises in the hills &amp; it is
long.</p><p>It goes to the sea, which is a day away on foot, and two by the road.</p></article>
<footer>All rights reserved</footer></body></html>"""


@pytest.mark.parametrize("installed", [True, False])
def test_pages_become_their_text(monkeypatch, installed):
    if installed and not find_spec("trafilatura"):
        pytest.skip("trafilatura is not installed")
    if not installed:
        monkeypatch.setattr(html, "find_spec", lambda name: None)
    text = main_text(PAGE)
    assert "The river rises in the hills & it is long." in text and "It goes to the sea" in text
    assert "no" not in text.split() and "Shop" not in text and "color" not in text and "rights" not in text


@pytest.mark.parametrize(
    "page",
    ["<head><title>T</title><body><p>All of the text</p>", "<body><form action=x><p>All of the text</p></form></body>"],
)
def test_pages_keep_what_stands_in_an_open_head_or_a_form(monkeypatch, page):
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    assert main_text(page) == "All of the text"


def test_only_pages_are_treated_as_pages():
    text = "if a <b> c then <p> d"
    assert changed(html.html, text) == text
    assert changed(html.html, PAGE, format="html").count("<") == 0
    assert changed(html.html, "<html><body></body></html>", format="html") == Removed("page without text")


@pytest.mark.parametrize("page", ["<p>a<script>b", "<" * 1000, "<p>" * 5000 + "deep", "</nav>text<p>", "\x00<p>x"])
def test_broken_pages_do_no_harm(page):
    main_text(page)


def test_what_is_masked_is_counted():
    text = (
        "Write to jane.doe+x@mail.example.org or call +49 30 1234567, (555) 123-4567 or 555-123-4567. "
        "Card 4111 1111 1111 1111, or 5500005555555559."
    )
    document = masking(("email", "phone", "card"))(Document(text, "d"))
    assert document.text == "Write to <email> or call <phone>, <phone> or <phone>. Card <card>, or <card>."
    assert document.metadata["masked"] == {"email": 1, "card": 2, "phone": 3}


@pytest.mark.parametrize(
    "text",
    [
        "In 1984-1985, on 2021-12-31 at 10:30:15, version 1.2.3.4", "4111 1111 1111 1112 is no card", "0000 0000 0000 0000",
        "ISBN 978-3-16-148410-0", "user@host and @name", "pi is 3.14159265358979323846", "12 345 678 people in 1990",
    ],
)  # fmt: skip
def test_what_only_looks_alike_stays(text):
    document = masking(("email", "phone", "card"))(Document(text, "d"))
    assert document.text == text and "masked" not in document.metadata


def test_only_what_is_asked_for_is_masked():
    document = masking(("email",))(Document("a@b.org +49 30 1234567", "d"))
    assert document.text == "<email> +49 30 1234567"


def test_luhn():
    assert luhn("4111111111111111") and not luhn("4111111111111121")


def test_words_of_scripts_with_and_without_spaces():
    assert WORDS.word_tokenize("The cat's mat, well-made ... (no) 3.5 日本語です。") == [
        "The", "cat's", "mat", "well-made", "...", "no", "3", "5", "日", "本", "語", "で", "す",
    ]  # fmt: skip
    text = "One. Two! 三。Four"
    assert [text[a:b] for a, b in WORDS.span_tokenize(text)] == ["One.", "Two!", "三。", "Four"]
    assert separates_words("an English text with 漢字 in it") and not separates_words(
        "日本語で書かれた長い文 with ASCII"
    )


def test_words_need_neither_spacy_nor_nltk():
    """In a process of its own: other tests import them."""
    code = "from llama_fast.data.steps.words import WORDS; import sys; WORDS.word_tokenize('a b'); print({'spacy', 'nltk'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
