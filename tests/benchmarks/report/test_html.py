"""The page of one run as HTML: what it says, that it loads nothing, and that it fits a screen."""

import json
import re
from dataclasses import replace

import pytest

from llama_fast.benchmarks.report.publish import write_report_of_one_run
from tests.benchmarks.records import CPU_MACHINE, record, result, rich_record
from tests.browser import element, opened
from tests.parity import not_interpreted

pytestmark = not_interpreted

PHONE, DESK = 360, 1100


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_report_of_one_run(rich_record(), tmp_path_factory.mktemp("report"))[1]


def test_it_is_of_this_run_alone(tmp_path):
    markdown, html = write_report_of_one_run(record(result("rope", "8192 x 4096", "llama-fast", 1e-4)), tmp_path)
    assert (markdown.name, html.name) == ("performance.md", "performance.html")
    for text in (markdown.read_text(encoding="utf-8"), html.read_text(encoding="utf-8")):
        assert "NVIDIA H100 80GB HBM3" in text and "8192 x 4096" in text
        assert "H200" not in text and "not been measured" not in text and "benchmarks/results" not in text


def test_a_quick_run_and_a_cpu_are_said_to_be_so(tmp_path):
    rope = result("rope", "8192 x 4096", "llama-fast", 1e-4)
    for each, said in ((record(rope), False), (record(rope, gpu=False, settings={"quick": True}), True)):
        text = write_report_of_one_run(each, tmp_path)[1].read_text(encoding="utf-8")
        assert ("llama-fast bench --quick</code>: few sizes" in text) == said
        assert ("On CPUs (AMD EPYC, 2 threads) no Triton kernel ran" in text) == said


def test_what_comes_from_outside_is_escaped(tmp_path):
    odd = '<script>alert("x")</script>'
    here = record(
        result("rope", odd, odd, 1e-4, note=odd), result(odd, "1 x 1", "llama-fast", None, failure=odd), warnings=[odd]
    )
    here = replace(here, machine=CPU_MACHINE | {"processor": odd})
    html = write_report_of_one_run(here, tmp_path)[1].read_text(encoding="utf-8")
    assert "<script" not in html and html.count("&lt;script>") + html.count("&lt;script&gt;") > 8


def test_nothing_is_loaded_and_nothing_complains(browser, file):
    browser.get("about:blank")
    browser.get_log("performance")
    opened(browser, file, DESK)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert file.as_uri() in asked  # the log sees what is loaded
    assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []


def test_every_picture_is_seen_and_every_section_can_be_reached(browser, file):
    opened(browser, file, DESK)
    seen = browser.execute_script("return [...document.images].map(each => [each.alt, each.naturalWidth])")
    assert len(seen) == 6 and all(alt and width > 500 for alt, width in seen)
    links = browser.find_elements("css selector", "nav a")
    assert [link.text for link in links] == ["NVIDIA H100 80GB HBM3", "rms_norm", "attention", "generate"]
    for link in links:
        target = element(browser, link.get_attribute("href").rpartition("#")[2].join(("[id='", "']")))
        assert target.text.startswith(link.text)


@pytest.mark.parametrize("width", [PHONE, 768, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(browser, file, width, scheme):
    """A wide table scrolls inside its own box."""
    opened(browser, file, width, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('main :is(p, img, pre, h2, h3, li, .wide)')]"
        ".filter(e => !e.closest('.wide p') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    )
    assert beyond == []


def test_the_whole_page_has_its_colours_from_the_shared_style(file):
    html = file.read_text(encoding="utf-8")
    assert len(re.findall("<!doctype html>", html)) == 1 and "prefers-color-scheme: dark" in html
