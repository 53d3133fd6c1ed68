"""The summary in a terminal: every figure of the profile, sums that add up as printed, 80 columns."""

import io
import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llama_fast.profiler.report import view
from llama_fast.profiler.report.terminal import show
from llama_fast.profiler.result import ContextPoint, Part, Waterfall
from llama_fast.reports import units
from tests.profiler.profiles import synthetic


def shown(profile, width=80):
    console = Console(width=width, file=io.StringIO())
    show(profile, console)
    return console.file.getvalue()


def test_every_block_is_there_within_80_columns():
    text = shown(synthetic(batches=(1, 8)))
    for heading in (
        "Latency: 512 prompt tokens, 128 new, batch 1", "Latency: 512 prompt tokens, 128 new, batch 8",
        "Where a token's", "Where the first token's", "Kernels of one decoding step", "Distance to the limit over context",
        "Each fusion off in turn", "Why to believe it",
    ):  # fmt: skip
        assert heading in text
    for name in ("TTFT", "ITL", "TPOT", "E2EL", "tokens/s", "cold", "transformers", "norm_swiglu_kernel", "LOSES"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("which", ["token", "first token"])
def test_printed_parts_add_up_to_the_printed_sum(which):
    lines = shown(synthetic()).split(f"Where {'a' if which == 'token' else 'the'} {which}'s")[1].splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("sum = measured"))
    figures = [float(re.search(r" ([\d,.]+) +[\d.]+ %", line)[1].replace(",", "")) for line in lines[3 : end - 1]]
    assert sum(figures) == pytest.approx(float(lines[end].split()[3].replace(",", "")))


def test_bars_are_steps():
    """Each part's bar begins at the column where the one before ended."""
    lines = shown(synthetic()).split("Where a token's")[1].splitlines()[3:]
    bars = [re.search(r"%( +)([█▏▎▍▌▋▊▉]+)", line) for line in lines[:8]]
    for bar, following in itertools.pairwise(bars):
        assert abs(len(following[1]) - len(bar[1]) - len(bar[2].strip("▏▎▍▌"))) <= 1
    assert len(bars[0][1]) == 2 < len(bars[-1][1])


@pytest.mark.parametrize(("waited", "busy"), [(None, False), (0.01, False), (0.36, True)])
def test_parts_that_a_busy_machine_spoiled_are_said_to_be_so(waited, busy):
    profile = synthetic(machine="cpu")
    profile = replace(profile, runs=[replace(profile.runs[0], waited=waited), *profile.runs[1:]])
    text = shown(profile)
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    assert text.count("(not to be believed: the machine was busy)") == (3 if busy else 0)
    assert (view.BUSY in text) == busy
    known = "not known on this system" if waited is None else f"llama-fast, batch 1: {units.percent(waited)}"
    assert known in text


def test_names_from_outside_are_no_markup():
    text = shown(synthetic(model="[red]odd[/]/model", against=["[bold]side[/]"]))
    assert "[red]odd[/]/model" in text and "[bold]side[/]" in text


def test_a_profile_with_little_in_it_is_shown():
    profile = synthetic(machine="cpu", against=())
    text = shown(replace(profile, contexts=[], ablations=[], runs=[replace(profile.runs[0], kernels=[])]))
    assert "Kernels" not in text and "Operators" not in text and "fusion" not in text
    assert "warning" in text


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda parts: sum(parts) > 1e-9), st.floats(1e-9, 100))
def test_a_column_adds_up_as_printed(parts, scale):
    parts = [part * scale for part in parts]
    unit, total, figures = units.column(sum(parts), parts)
    read = [float(figure.replace(",", "")) for figure in [total, *figures]]
    decimals = len(total.partition(".")[2])
    assert read[0] == pytest.approx(sum(read[1:]), abs=10**-decimals / 2)
    seconds = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]
    for part, figure in zip(parts, read[1:], strict=True):
        assert figure * seconds == pytest.approx(part, abs=1.001 * seconds * 10**-decimals)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (units.number(0), "0"), (units.number(1234.0), "1,230"), (units.number(0.012345), "0.0123"),
        (units.number(9.996), "10.0"), (units.number(-51.23), "-51.2"), (units.duration(1.2e-3), "1.20 ms"),
        (units.duration(9.999e-4), "1.00 ms"), (units.duration(0.0), "0 ns"), (units.size(2.472e9), "2.47 GB"),
        (units.size(999.9e6), "1.00 GB"), (units.flops(3e12), "3.00 TFLOP"), (units.tokens(32768), "32k"),
        (units.tokens(1000), "1,000"), (units.percent(0.0123), "1.2 %"), (units.percent(0.9), "90 %"), (units.percent(-1e-9), "0.0 %"), (units.percent(12.345), "1,230 %"),
    ],
)  # fmt: skip
def test_figures_have_three_digits_and_a_unit(figure, text):
    assert figure == text


def test_a_negative_rest_steps_back():
    waterfall = Waterfall(
        1e-3, [Part("floor", 0.9e-3, "floor"), Part("gaps", 0.2e-3, "gap"), Part("rest", -1e-4, "rest")]
    )
    drawn = view.steps(waterfall)
    assert drawn.steps[2].left == pytest.approx(1 / 1.1) and drawn.steps[2].end < drawn.steps[2].start
    assert drawn.width == pytest.approx(1 / 1.1)
    assert drawn.steps[2].figure == "-100" and drawn.total == "1,000"


def _points(*kv_bytes):
    return [ContextPoint("s", 1024 * (i + 1), 1, 1000, kv, 1e-3, None) for i, kv in enumerate(kv_bytes)]


@pytest.mark.parametrize(
    ("kv_bytes", "context"),
    [
        ((500, 1000, 1500), 2048),  # at a point
        ((100, 200), 10240),  # beyond the last
        ((2000, 4000), 512),  # before the first
        ((750, 1250), 1536),  # between two
        ((100, 100), None),  # a sliding window
        ((250,), 4096),
    ],
)
def test_crossover(kv_bytes, context):
    assert view.crossover(_points(*kv_bytes)) == (None if context is None else pytest.approx(context))


def test_kernels_are_ranked_by_what_can_be_won_and_rated_by_what_binds():
    profile = synthetic()
    ranked = view.ranked(profile.runs[0].kernels)
    assert [k.winnable for k in ranked] == sorted((k.winnable for k in ranked), reverse=True)
    qkv = next(k for k in ranked if k.where == "attention.qkv")
    rate = view.rate(qkv, profile.limits)
    assert rate.binds == "memory" and rate.text == f"{units.size((qkv.read + qkv.written) / qkv.seconds)}/s"
    prompt = next(k for k in profile.runs[0].prompt_kernels if k.where == "mlp.gate_up")
    assert view.rate(prompt, profile.limits).binds == "compute" and "TFLOP/s" in view.rate(prompt, profile.limits).text
    assert view.rate(next(k for k in ranked if k.where == "not attributed"), profile.limits).text == ""
