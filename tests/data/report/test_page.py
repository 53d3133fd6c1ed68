"""The report of a run: nothing is loaded, nothing of a document is markup, and its figures are the record's."""

import html as escaping
import re

import pytest

from llama_fast.data.report import record
from llama_fast.data.report.markdown import markdown
from llama_fast.data.report.page import histogram, page
from llama_fast.reports.jsonfile import read_json, write_json
from tests.browser import element, opened
from tests.parity import not_interpreted

EVIL = '<script>alert("x")</script> | `a` *b* <img src="http://x.org/y.png">'


def report():
    lengths = [0] * record.BINS
    lengths[18], lengths[20] = 900, 100
    after = [0] * record.BINS
    after[18] = 880
    read = record.Step("collect", "read", 1000, 1000, 540_000, 540_000, 0.5, list(lengths), list(lengths), faults=2)
    read.named_faults = [record.NamedFault("a/<b>.jsonl", 7, EVIL), record.NamedFault("c.gz", None, "cannot be read")]
    examples = [record.Example(f"a.txt:{i}", EVIL) for i in range(5)]
    removed = [record.Removal("short doc", 100, examples), record.Removal("<b>", 20, examples[:1])]
    quality = record.Step("clean", "quality", 1000, 880, 540_000, 500_000, 2.0, list(lengths), after, 3, removed)
    quality.counts = [record.Count("email", 12)]
    shares = [record.SourceShare("web", 1.0, 5000, 2500), record.SourceShare("books", 3.0, 7500, 7500)]
    shards = [record.Shards("out/shards", 4, 880, 10_000, 36_000)]
    return record.Report(
        EVIL, "out", ["datatrove 0.10"], {"a.b": None, "c": EVIL}, [read, quality], [], shares, 4096, shards
    )


def test_the_page_needs_nothing_and_trusts_nobody():
    text = page(report())
    assert "<script" not in text and "<img" not in text and not re.search(r"""(?:src|href)=["']http""", text)
    assert escaping.escape("<script>alert") in text
    for figure in (
        "1,000",
        "880",
        "120",
        "12 %",
        "short doc: 100",
        "email: 12",
        "3.60",
        "75 %",
        "a/&lt;b&gt;.jsonl:7",
        "c.gz",
    ):
        assert figure in text, figure
    assert text.count("<blockquote>") == 6


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_just_begun_has_a_page(steps):
    begun = report()
    begun.steps, begun.shards, begun.mixture, begun.vocab_size = begun.steps[:steps], [], [], None
    if steps:
        begun.steps[0].documents_in = begun.steps[0].documents_out = 0
        begun.steps[0].seconds = 0.0
        begun.steps[0].lengths_out = [0] * record.BINS
    assert "Data report" in page(begun) and "# Data" in markdown(begun)


def test_markdown_says_the_same():
    text = markdown(report())
    assert "| clean: quality | 1,000 | 120 | 880 | 3 | 540 kB | 500 kB | 2.00 s | 270 kB/s |" in text
    assert "- **short doc**: 100" in text and "- masked email: 12" in text and "`c.gz` cannot be read" in text
    assert "<" not in text and "| books | 3.00 | 7,500 | 7,500 | 75 % |" in text
    assert all(line.count("|") - line.count("\\|") == 10 for line in text.splitlines() if line.startswith("| c"))


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "report.json", report())
    assert read_json(tmp_path / "report.json", record.Report) == report()


def test_tasks_are_merged():
    parts = [report().steps[1] for _ in range(3)]
    parts[2].removed.append(record.Removal("late", 500))
    total = record.merged(parts)
    assert (total.documents_in, total.documents_out, total.seconds, total.changed) == (3000, 2640, 6.0, 9)
    assert [(removal.reason, removal.documents) for removal in total.removed] == [
        ("late", 500),
        ("short doc", 300),
        ("<b>", 60),
    ]
    assert [len(removal.examples) for removal in total.removed] == [0, 5, 3]
    assert total.lengths_in[18] == 2700 and total.counts == [record.Count("email", 36)]


def test_histogram():
    bins = [0] * record.BINS
    assert histogram("x", bins, bins) is None
    bins[19], bins[20] = 10, 5
    plot = histogram("x", bins, [0] * record.BINS)
    assert [bar.before for bar in plot.bars] == [0, 100, 50, 0] and {bar.after for bar in plot.bars} == {0}
    assert "724 B to 1.02 kB: 10, then 0" in [bar.title for bar in plot.bars]


@not_interpreted
@pytest.mark.parametrize("width", [390, 1100])
def test_it_fits_its_window(browser, tmp_path, width):
    (tmp_path / "report.html").write_text(page(report()))
    opened(browser, tmp_path / "report.html", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert element(browser, ".lengths rect.before").rect["height"] > 50
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
