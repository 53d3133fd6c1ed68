"""The dirt that raw.py plants, and how planted.py counts what became of it."""

import random
from collections import Counter

import pytest

from llama_fast.data.documents import Document
from llama_fast.data.steps.clean import unicode
from llama_fast.data.steps.html import main_text

TEXT = (
    "HAMLET.\nThe king's to blame -- and that's the end of it.\nTo be, or not to be, that is the question.\n\n[Exit.]"
)


@pytest.fixture
def raw(program):
    return program("raw")


@pytest.fixture
def planted(program):
    return program("planted")


@pytest.fixture
def dirty(raw):
    documents = [raw.Planted(f"modern/play/{i}", "plays/modern/play.jsonl", f"{i} {TEXT}") for i in range(200)]
    return list(raw.dirty(documents, random.Random(0)))


def of(dirty, dirt):
    return [each for each in dirty if each.dirt == dirt]


def test_every_kind_has_its_share_and_copies_stand_beside_what_they_copy(raw, dirty):
    counts = Counter(each.dirt for each in dirty)
    assert counts.pop("") == 200 - sum(count for dirt, count in counts.items() if dirt not in ("exact", "near"))
    assert counts == {dirt: 200 * share for dirt, share in raw.SHARE.items()}
    originals = {each.id for each in of(dirty, "")}
    assert all(each.of in originals for each in dirty if each.dirt in ("exact", "near"))


def test_what_can_be_mended_is_mended_by_the_pipeline(planted, dirty):
    for each in [*of(dirty, "mojibake"), *of(dirty, "control")]:
        assert planted.words(each.text) != planted.words(each.meant)
        assert planted.words(unicode(Document(each.text, "")).text) == planted.words(each.meant)
    assert "â€™" in of(dirty, "mojibake")[0].text


def test_a_page_has_a_menu_and_the_text(dirty):
    for each in of(dirty, "page"):
        assert "<nav>" in each.text and "that is the question" in main_text(each.text)


def test_a_near_copy_differs_in_few_words(dirty):
    originals = {each.id: each.text.split() for each in of(dirty, "")}
    for each in of(dirty, "near"):
        pairs = zip(each.text.split(), originals[each.of], strict=True)
        assert 0 <= sum(a != b for a, b in pairs) <= 1  # a word may be drawn for itself


def test_what_became_of_it_is_counted(planted):
    records = [
        {"id": "kept"}, {"id": "gone"}, {"id": "apart"}, {"id": "doubled"}, {"id": "replaced"},
        {"id": "copy 1", "dirt": "exact", "of": "doubled"}, {"id": "copy 2", "dirt": "exact", "of": "replaced"},
        {"id": "bad", "dirt": "control", "text": "a b"}, {"id": "good", "dirt": "control", "text": "a b"},
        {"id": "leak", "dirt": "leak", "of": "apart"}, {"id": "cut/0"}, {"id": "cut/1"},
    ]  # fmt: skip
    kept = {"kept": "", "doubled": "", "copy 1": "", "copy 2": "", "bad": "ab", "good": "a\nb", "leak": "", "cut/0": ""}
    found = [
        *planted.clean(records, kept, {"apart"}),
        *planted.mended(records, kept),
        *planted.copies(records, kept),
    ]
    counts = {each["what"]: (each["count"], each["of"], each.get("examples")) for each in found}
    assert counts["clean documents lost"] == (1, 5, ["gone"])
    assert counts["documents read of a .gz that breaks off"] == (1, 2, None)
    assert counts["control characters removed"] == (1, 2, ["bad"])
    assert counts["exact copies found"] == (1, 2, ["copy 1"])
    assert counts["copies of held-out passages found"] == (0, 1, ["leak"])
