"""The page of a run: nothing is loaded, nothing of a sample is markup, and its curves are the metrics'."""

import html
import math
import re

import pytest

from llama_fast.train.metrics import Sample
from llama_fast.train.report.curves import BUCKETS, curve, linear_ticks, log_ticks
from llama_fast.train.report.page import curves, page
from tests.browser import element, opened
from tests.parity import not_interpreted
from tests.train.test_metrics import step

EVIL = '<script>alert("x")</script> <img src="http://x.org/y.png">'


def run(count=300):
    metrics = [step(i, loss=2 + 6 / i, bits_per_byte=1 + 1 / i if i % 50 == 0 else None) for i in range(1, count + 1)]
    metrics[9] = step(10, loss=float("nan"), gradient_norm=float("nan"), skipped=True)
    return metrics


def test_it_needs_nothing_and_trusts_nobody(config):
    made = config(f"run.sample='{EVIL}'")
    text = page(made, run(), [Sample(50, EVIL), Sample(100, "later")], parameters=85312)
    assert "<script" not in text and "<img" not in text and not re.search(r"""(?:src|href)=["']http""", text)
    assert html.escape("<script>alert") in text
    assert text.index("step 100</h3>") < text.index("step 50</h3>")
    assert "85,312 parameters, float32 · MFU 25 % at last" in text and "One step was skipped" in text
    for figure in (
        "<dd>300</dd>",
        "2.0200",
        "1.0033",
        "at step 300",
        "300,000",
        "2,000 tokens/s",
        "optimizer.groups.0.match",
    ):
        assert figure in text, figure
    assert '<th scope="row">10</th><td>nan</td><td>nan</td>' in text


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_that_has_just_begun_has_a_page(config, count):
    metrics = [step(1)][:count]
    text = page(config(), metrics, [], parameters=1)
    assert ("No step has ended." in text) == (count == 0) and text.count("<figure>") == len(
        list(curves(config(), metrics))
    )


def points(text):
    return [tuple(map(float, each.split(","))) for each in text.split()]


def test_a_line_goes_through_the_values():
    line = curve("x", "", [(1, 5.0), (2, 15.0), (3, math.nan), (4, 10.0)], steps=4)
    assert points(line.line) == [(25, pytest.approx(91.667)), (50, pytest.approx(8.333)), (100, 50)] and not line.band
    assert [label for _, label in line.ticks_y] == ["4", "6", "8", "10", "12", "14", "16"]
    assert line.last == "10.00" and line.dots[0][2] == "step 1: 5.000"
    assert curve("x", "", [(1, math.inf)], steps=1) is None and curve("x", "", [(1, 0.0)], steps=1, log=True) is None


def test_a_long_run_keeps_its_extremes_in_the_band():
    values = [(i, 100.0 if i == 777 else 1.0) for i in range(1, 1001)]
    line = curve("x", "", values, steps=1000, from_zero=True)
    assert len(points(line.line)) == BUCKETS and not line.dots
    assert min(y for _, y in points(line.band)) == 0 and min(y for _, y in points(line.line)) > 50
    assert line.ticks_y[0] == (100, "0")


def test_a_curve_that_does_not_change_is_a_line_all_the_same():
    for log in (False, True):
        ((_, y), _) = points(curve("x", "", [(1, 3.0), (2, 3.0)], steps=2, log=log).line)
        assert 0 <= y <= 100


def test_ticks():
    assert [text for _, text in linear_ticks(0, 3600, whole=True)] == ["0", "1,000", "2,000", "3,000", "4,000"]
    assert [text for _, text in linear_ticks(0, 2, whole=True)] == ["0", "1", "2"]
    assert [text for _, text in linear_ticks(0.12, 0.31)] == ["0.10", "0.15", "0.20", "0.25", "0.30", "0.35"]
    assert [text for _, text in log_ticks(math.log10(0.3), math.log10(4))] == ["0.2", "0.5", "1", "2", "5"]
    assert [text for _, text in log_ticks(-3.5, 2.5)] == ["0.0001", "0.001", "0.01", "0.1", "1", "10", "100", "1e+03"]


@not_interpreted
@pytest.mark.parametrize("width", [390, 1100])
def test_it_fits_its_window(browser, config, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(page(config(), run(), [Sample(50, "a" * 300)], parameters=85312))
    opened(browser, path, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    box, line = element(browser, ".plot").rect, element(browser, ".plot .line").rect
    assert line["width"] == pytest.approx(box["width"], abs=3) and 30 < line["height"] <= box["height"] + 3
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
