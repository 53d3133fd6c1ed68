"""Pictures as they are drawn: nothing over anything else, no wider than a page, and a logarithmic axis where a linear one hides a curve."""

import itertools
import re
from pathlib import Path

import pytest

from llama_fast.benchmarks.report.plots import LIMIT, Panel, Picture, Series, draw
from llama_fast.benchmarks.report.publish import DOCS
from tests.browser import opened
from tests.parity import not_interpreted

pytestmark = not_interpreted

PAGE_WIDTH = 620  # points
LONG = tuple(f"Llama-3.1-70B layer gate_up, {2**i} x 8192 -> 57344 + residual" for i in range(9))


def drawn(folder: Path, *panels: Panel) -> Path:
    path = folder / "a.svg"
    draw(Picture("a.svg", "linear on a GPU with a long name: throughput over size", panels), path)
    return path


def throughput(
    names: tuple[str, ...], *values: float, title: str = "forward + backward, bfloat16,\nbound by arithmetic"
) -> Panel:
    series = [Series(name, tuple(enumerate(v * (1 + i) for i in range(len(names))))) for name, v in zip(("llama-fast", "PyTorch", LIMIT), values, strict=False)]  # fmt: skip
    return Panel(title, "", "TFLOP/s", tuple(series), names=names)


def words(browser, path: Path) -> dict[str, list[tuple[str, dict]]]:
    """All texts of a picture and where they stand."""
    opened(browser, path, 1400)
    script = (
        "return [...document.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect().toJSON()])"
    )
    return browser.execute_script(script)


def overlapping(texts: list[tuple[str, dict]]) -> list[tuple[str, str]]:
    return [
        (a, b)
        for (a, r), (b, s) in itertools.combinations(texts, 2)
        if min(r["right"], s["right"]) - max(r["left"], s["left"]) > 1 and min(r["bottom"], s["bottom"]) - max(r["top"], s["top"]) > 3
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((DOCS / "performance").rglob("*.svg")), ids=lambda path: path.name)
def test_no_words_of_a_committed_picture_stand_on_others(browser, path):
    assert overlapping(words(browser, path)) == []


PANELS = {
    "one": [throughput(LONG, 3, 4, 5)],
    "alike, side by side": [throughput(LONG[:2], 3, 4, 5), throughput(LONG[:2], 3, 4, 5)],
    "of other sizes": [throughput(LONG, 3, 4, 5), throughput(LONG[:3], 3, 4, 5)],
    "many": [throughput(("512 x 2048", "512 x 4096"), 1, 30)] * 5,
    "over context": [
        Panel(f"Llama-3.1-8B, batch {i}", "context, tokens", "tokens/s", (Series("PyTorch", ((1024, 3.0), (65536, 2.0))),), log_x=True, ticks=(1024, 65536))
        for i in range(5)
    ],
}  # fmt: skip


@pytest.mark.parametrize("panels", PANELS.values(), ids=PANELS)
def test_whatever_is_in_it_a_page_holds_it_and_its_words_lie_flat(browser, tmp_path, panels):
    path = drawn(tmp_path, *panels)
    svg = path.read_text(encoding="utf-8")
    assert float(re.search(r'width="([\d.]+)pt"', svg)[1]) <= PAGE_WIDTH
    assert set(re.findall(r"rotate\(-?([\d.]+)", svg)) <= {"0", "90"}, "only the name of an axis stands upright"
    texts = words(browser, path)
    assert overlapping(texts) == []
    assert all(box["left"] >= -1 and box["right"] <= PAGE_WIDTH / 0.75 + 1 for _, box in texts)


@pytest.mark.parametrize(("low", "high", "expected"), [(800, 22_000, True), (800, 3_000, False), (0, 22_000, False)])
def test_the_axis_is_logarithmic_where_a_curve_would_lie_on_the_floor(tmp_path, low, high, expected):
    series = (Series("llama-fast", ((64, low), (512, low))), Series(LIMIT, ((64, high), (512, high))))
    over_context = Panel("a model", "context", "tokens/s", series, log_x=True, ticks=(64, 512))
    for panel in (over_context, throughput(("a", "b"), low, 2 * low, high)):
        svg = drawn(tmp_path, panel).read_text(encoding="utf-8")
        assert ("/s, logarithmic" in svg) == expected
        assert (">0</text>" in svg) == (not expected), "a linear axis begins at zero"


def test_one_axis_has_figures_however_short_it_is(tmp_path):
    """Of 110 to 190 no decade's 1, 2 and 5 are on it."""
    panel = Panel("a model", "context", "tokens/s", (Series("PyTorch", ((1, 110.0), (2, 190.0))),), log_y=True)
    assert ">150</text>" in drawn(tmp_path, panel).read_text(encoding="utf-8")
