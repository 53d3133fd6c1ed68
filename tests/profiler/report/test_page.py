"""The HTML page of a profile, opened in headless Chromium: what it says, that it loads nothing, how it looks at any width and colour."""

import io
import itertools
import json
from dataclasses import replace

import pytest
from PIL import Image

from llama_fast.profiler.report import view
from llama_fast.profiler.report.page import page
from llama_fast.profiler.result import Part
from tests.browser import element, opened
from tests.profiler.profiles import synthetic

SECTIONS = ("latency", "waterfall", "kernels", "context", "ablation", "trust", "machine")
PHONE, DESK = 360, 1100


def test_what_comes_from_outside_is_escaped():
    html = page(synthetic(model='<script>alert("x")</script>', against=["<b>bold</b>"]))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<b>bold" not in html


def test_a_side_that_is_faster_is_said_to_be():
    profile = synthetic(against=["transformers"])
    ours, theirs = profile.runs
    assert '<span class="good">slower</span>' in page(profile)
    assert '<span class="bad">faster</span>' in page(replace(profile, runs=[theirs, ours]))
    same = replace(theirs, latency=ours.latency)
    assert '<span class="">as fast</span>' in page(replace(profile, runs=[ours, same]))


def test_parts_that_a_busy_machine_spoiled_are_said_to_be_so():
    quiet = synthetic(against=["transformers"])
    busy = replace(quiet, runs=[replace(quiet.runs[0], waited=0.36), quiet.runs[1]])
    doubt = "llama-fast (not to be believed: the machine was busy)</caption>"
    for profile, times in ((quiet, 0), (busy, 1)):
        html = page(profile)
        assert html.count(f'<p class="bad">{view.BUSY}</p>') == times
        assert html.count(doubt) == 4 * times  # two waterfalls, two tables of kernels
        assert "transformers (not to be believed" not in html


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "profile.html"
    path.write_text(page(synthetic(batches=(1, 8))), encoding="utf-8")
    return path


def pictures(browser, *selectors):
    """Of each element, out of one picture of the whole page."""
    size = browser.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=size[0], height=size[1], deviceScaleFactor=1, mobile=size[0] < 500),
    )
    whole = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    rects = [element(browser, selector).rect for selector in selectors]
    return [whole.crop((r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"])) for r in rects]


def colours(image):
    """Those that at least one pixel in a thousand has."""
    few = image.width * image.height / 1000
    return {colour for count, colour in image.getcolors(1 << 24) if count > few}


def test_nothing_is_loaded_and_nothing_complains(browser, file):
    browser.get("about:blank")
    browser.get_log("performance")
    opened(browser, file, DESK)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert file.as_uri() in asked  # the log sees what is loaded
    assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []


def test_a_page_that_loads_something_would_be_seen(browser, file, tmp_path):
    """The check above can fail: a picture from a network is refused by the page's policy, and the console says so."""
    other = tmp_path / "other.html"
    other.write_text(file.read_text(encoding="utf-8").replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">'))
    opened(browser, other, DESK)
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_every_section_is_there_with_its_figures(browser, file):
    opened(browser, file, DESK)
    for name in SECTIONS:
        section = element(browser, f"section#{name}")
        assert section.is_displayed() and section.find_element("css selector", "h2").text.lower() == name
        assert section.find_element("css selector", "table").is_displayed()
        assert element(browser, f"nav a[href='#{name}']").is_displayed()
    for which in ("#waterfall-token", "#waterfall-first-token"):
        rows = element(browser, which).find_elements("css selector", "tbody td:nth-child(2)")
        total = element(browser, f"{which} tfoot td").text
        assert sum(float(row.text.replace(",", "")) for row in rows) == pytest.approx(float(total.replace(",", "")))
    assert "KV = weights at" in element(browser, ".chart").text
    assert element(browser, "html").get_attribute("lang") == "en"
    assert "Imagined-1B" in browser.title


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_are_not_blank(browser, file, width, scheme):
    opened(browser, file, width, scheme)
    least = {".stacks": 4, "#waterfall-token": 4, "#kernels table": 4, ".chart": 5, "#ablation tbody .bar": 2}
    for (selector, count), image in zip(least.items(), pictures(browser, *least), strict=True):
        assert len(colours(image)) >= count, selector


def test_a_part_begins_where_the_one_before_ended(browser, file):
    opened(browser, file, DESK)
    bars = [bar.rect for bar in element(browser, "#waterfall-token").find_elements("css selector", "tbody .bar i")]
    for bar, following in itertools.pairwise(bars):
        assert following["x"] == pytest.approx(bar["x"] + bar["width"], abs=2)
        assert following["y"] > bar["y"]
    whole = element(browser, "#waterfall-token tfoot .bar i").rect
    assert bars[-1]["x"] + bars[-1]["width"] == pytest.approx(whole["x"] + whole["width"], abs=2)


@pytest.mark.parametrize("width", [PHONE, 768, DESK])
def test_nothing_is_wider_than_the_screen(browser, file, width):
    opened(browser, file, width)
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('main :is(th, td, p, span, em, h2, summary)')]"
        ".filter(e => e.className != 'unseen' && !e.closest('thead') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.textContent)"
    )
    assert beyond == []


def test_text_can_be_read_on_a_phone(browser, file):
    opened(browser, file, PHONE)
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('td, th, p, dd, dt, li')].filter(e => e.offsetParent)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11


def _luminance(colour):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a, b):
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _colour(browser, selector, which):
    text = browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, which
    )
    return tuple(int(float(part)) for part in text[text.index("(") + 1 : -1].split(",")[:3])


def test_colours_follow_the_scheme_and_can_be_told_from_the_paper(browser, file):
    """WCAG: 4.5 for text, 3 for pictures."""
    seen = {}
    for scheme in ("light", "dark"):
        opened(browser, file, DESK, scheme)
        paper = _colour(browser, "body", "backgroundColor")
        seen[scheme] = paper
        for selector in ("body", ".lead", "nav a", "thead th", "th small", ".good", ".loses", ".gains"):
            assert _contrast(_colour(browser, selector, "color"), paper) >= 4.5, (scheme, selector)
        kinds = ("floor", "inefficiency", "gap", "host", "sampling", "read-back", "text", "rest")
        for kind in kinds:
            assert _contrast(_colour(browser, f".legend .{kind}", "backgroundColor"), paper) >= 3, (scheme, kind)
        assert len({_colour(browser, f".legend .{kind}", "backgroundColor") for kind in kinds}) == len(kinds)
        [heading] = pictures(browser, "h2")
        assert heading.getpixel((0, 0)) == paper
    assert _luminance(seen["dark"]) < 0.05 < 0.8 < _luminance(seen["light"])


def test_a_bar_that_a_negative_rest_takes_back_is_not_wider_than_the_page(browser, tmp_path):
    """Parts that were measured apart may be more than the latency: then the bar ends where they do, and a line says where the latency does."""
    profile = synthetic()
    run = profile.runs[0]
    token = run.token
    parts = [Part("floor", 3 * token.measured, "floor"), Part("rest", -2 * token.measured, "rest")]
    path = tmp_path / "negative.html"
    runs = [replace(run, token=replace(token, parts=parts)), *profile.runs[1:]]
    path.write_text(page(replace(profile, runs=runs)), encoding="utf-8")
    opened(browser, path, PHONE)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE
    bar, line = element(browser, ".stack i.floor").rect, element(browser, ".stack b").rect
    assert line["x"] - bar["x"] == pytest.approx(bar["width"] / 3, abs=2)


def test_a_cpu_without_contexts_or_fusions_has_a_page_too(browser, tmp_path):
    profile = synthetic(machine="cpu", against=())
    run = replace(profile.runs[0], kernels=[], prompt_kernels=[])
    path = tmp_path / "bare.html"
    path.write_text(page(replace(profile, runs=[run], contexts=[], ablations=[])), encoding="utf-8")
    opened(browser, path, DESK)
    assert [element(browser, f"#{name} .none").is_displayed() for name in ("kernels", "context", "ablation")] == [
        True
    ] * 3
    assert browser.get_log("browser") == []
