"""A `Record`, and the comparison of two, as tables in a terminal of 80 columns."""

import statistics
from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama_fast.benchmarks.peers import BASELINE
from llama_fast.benchmarks.suite.compare import NOTICEABLE, Change, Comparison
from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.profiler.measure.limits import Limits

BASELINES = (BASELINE, "transformers", "llama.cpp")
"""What the others of the same work are set against: the first that is there."""

_MOST_WARNINGS = 8
_MOST_NAMES = 20
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def print_record(record: Record, console: Console) -> None:
    """A table for each piece of work, then who was not there, then what to beware of."""
    _print_limits(record, console)
    for _, group in groupby(record.results, key=lambda result: result.work_key):
        _print_work(list(group), record, console)
    for line in _skipped(record):
        console.print(line, style="dim", highlight=False)
    for warning in [*record.warnings[:_MOST_WARNINGS], *_more(record.warnings), *_spread(record), *_beyond(record)]:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)


def _print_limits(record: Record, console: Console) -> None:
    limits = record.limits
    rates = ", ".join(f"{name} {1e-12 * rate:.3g}" for name, rate in limits.matmul_flops_per_s.items())
    node = "" if limits.graph_node_s is None else f", graph node {1e6 * limits.graph_node_s:.2f} us"
    console.print(
        f"[bold]{escape(str(record.machine.get('gpu') or record.machine.get('processor')))}[/], measured: "
        f"read {1e-9 * limits.read_bytes_per_s:.4g} GB/s, copy {1e-9 * limits.copy_bytes_per_s:.4g} GB/s, "
        f"matmul {rates} TFLOP/s, launch {1e6 * limits.launch_s:.2f} us{node}",
        highlight=False,
    )


def _print_work(results: list[Result], record: Record, console: Console) -> None:
    timed = [result for result in results if result.samples]
    scale, unit = _unit([result.timing.median for result in timed])
    baseline = next((result for name in BASELINES for result in timed if result.implementation == name), None)
    memory = is_memory_bound(results[0], record.limits)
    table = Table(
        title=escape(", ".join(results[0].work_key)), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("", overflow="fold", min_width=12)
    against = "ratio" if baseline is None else f"x {baseline.implementation}"
    rate_unit, rate_scale = ("GB/s", 1.0) if memory else _flops_unit(timed)
    for column in (unit, "p20-p80", rate_unit, "of limit", against, "error", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        error, bound = _exponent(result.error), _exponent(result.bound)
        if not result.samples:
            table.add_row(escape(result.implementation), "[red]FAIL[/]", "", "", "", "", error, bound)
            continue
        timing = result.timing
        rate = result.gigabytes_per_s if memory else rate_scale * result.teraflops
        ratio = "" if baseline is None else f"{baseline.timing.median / timing.median:.2f}"
        table.add_row(
            escape(result.implementation), _digits(timing.median / scale),
            f"{_digits(timing.p20 / scale)}-{_digits(timing.p80 / scale)}", _digits(rate) if rate else "-",
            _share(result, record, memory), ratio, error, bound,
        )  # fmt: skip
    console.print(table)
    for result in results:
        if result.failure is not None:
            console.print(f"  [red]{escape(result.implementation)}:[/] {escape(_failure(result))}", highlight=False)
        elif result.note:
            console.print(f"  {escape(result.implementation)}: {escape(result.note)}", style="dim", highlight=False)


def is_memory_bound(result: Result, limits: Limits) -> bool:
    """Whether the result's floor is the time its bytes take, not its FLOPs."""
    rate = limits.matmul_flops_per_s.get(result.dtype)
    return not result.flops or rate is None or result.flops / rate < 0.999 * result.floor_s


def fits_cache(result: Result, record: Record) -> bool:
    """Whether a CPU's caches hold what the work reads and writes: then the bandwidth of memory is no limit to it."""
    return "gpu" not in record.machine and result.read + result.written <= record.limits.cache_bytes


def _share(result: Result, record: Record, memory: bool) -> str:
    if not result.floor_s:
        return "-"
    return "in cache" if memory and fits_cache(result, record) else f"{result.share_of_limit:.0%}"


def _failure(result: Result) -> str:
    reason = result.failure or ""
    return reason if reason.startswith("FAIL") else f"FAIL: {reason}"


def _unit(seconds: Sequence[float]) -> tuple[float, str]:
    smallest = min(seconds, default=1.0)
    return next((each for each in _UNITS if smallest >= each[0]), _UNITS[-1])


def _flops_unit(timed: Sequence[Result]) -> tuple[str, float]:
    """TFLOP/s, or GFLOP/s where those would be 0.05 or less; and how many of them are one TFLOP/s."""
    fastest = max((result.teraflops for result in timed), default=1.0)
    return ("TFLOP/s", 1.0) if fastest > 0.05 else ("GFLOP/s", 1e3)


def _digits(value: float) -> str:
    """Three of them, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _skipped(record: Record) -> list[str]:
    """Each reason once, with whom it keeps away."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for skipped in record.skipped:
        reasons.setdefault((skipped.implementation, skipped.reason), []).append(skipped.op)
    return [
        f"not measured: {escape(name)}: {escape(reason)} ({escape(', '.join(ops))})"
        for (name, reason), ops in reasons.items()
    ]


def _more(warnings: list[str]) -> list[str]:
    return (
        [f"... and {len(warnings) - _MOST_WARNINGS} more, in the file that --json writes"]
        if len(warnings) > _MOST_WARNINGS
        else []
    )


def _spread(record: Record) -> list[str]:
    timed = [result for result in record.results if result.samples]
    noisy = [result for result in timed if result.timing.is_noisy]
    if not noisy:
        return []
    if "gpu" not in record.machine:
        spread = statistics.median(result.timing.spread for result in timed)
        return [f"p20 to p80 are {spread:.0%} of a median apart (the median of {len(timed)}): a CPU is no quiet place"]
    lines = [
        f"{', '.join((*result.work_key, result.implementation))}: p20 to p80 are {result.timing.spread:.1%} of the median"
        for result in sorted(noisy, key=lambda result: -result.timing.spread)
    ]
    return lines[:_MOST_WARNINGS] + _more(lines)


def _beyond(record: Record) -> list[str]:
    """Nothing is faster than a limit, unless a cache helps or the limit was measured while something else ran."""
    beyond = [
        result for result in record.results
        if result.samples and result.floor_s and result.share_of_limit > 1.1
        and not (fits_cache(result, record) and is_memory_bound(result, record.limits))
    ]  # fmt: skip
    if not beyond:
        return []
    return [
        f"{len(beyond)} results are more than 10 % faster than the measured limits: something else ran while those were measured"
    ]


def print_comparison(found: Comparison, console: Console) -> None:
    """What moved, what failed, what is only in one file, and what decided."""
    for note in found.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    _print_changes("slower", "red", found.slower, console)
    _print_changes("faster", "green", found.faster, console)
    _print_changes("moved together with all that ran beside it: the machine did", "yellow", found.together, console)
    _print_changes("slower beside what ran with it, but not by the clock", "yellow", found.behind, console)
    failing = [f"{', '.join((*each.work_key, each.implementation))}: {each.failure}" for each in found.newly_failing]
    for title, style, names in (
        ("newly failing", "red", failing), ("repaired", "green", found.repaired),
        ("only in the first file", "dim", found.gone), ("only in the second file", "dim", found.new),
    ):  # fmt: skip
        if names:
            console.print(f"[{style}]{title}: {len(names)}[/]", highlight=False)
        for name in names[:_MOST_NAMES]:
            console.print(f"  {escape(name)}", highlight=False)
        if len(names) > _MOST_NAMES:
            console.print(f"  ... and {len(names) - _MOST_NAMES} more")
    if found.blind:
        console.print(
            f"[yellow]warning:[/] {found.blind} are too noisy, or have too few samples, to show a change of {NOTICEABLE:.0%}",
            highlight=False,
        )
    if abs(found.drift - 1) >= found.minimum:
        moved = f"{abs(found.drift - 1):.0%} {'slower' if found.drift > 1 else 'faster'}"
        console.print(
            f"[yellow]warning:[/] half of all results, the others' too, are {moved} or more: the machine, its load or its "
            "versions changed. --absolute judges by the clock alone.",
            highlight=False,
        )
    console.print(
        f"{len(found.slower)} slower, {len(found.faster)} faster, {found.unchanged} within the noise or {found.minimum:.0%}"
        f" (Yuen's test, 99 % for all together).",
        highlight=False,
    )


def _print_changes(title: str, style: str, changes: Sequence[Change], console: Console) -> None:
    if not changes:
        return
    console.print(f"[{style}]{title}: {len(changes)}[/]", highlight=False)
    for change in changes[:_MOST_NAMES]:
        clock = change.by_clock
        scale, unit = _unit([change.after.timing.median])
        times = (
            f"{_digits(change.before.timing.median / scale)} -> {_digits(change.after.timing.median / scale)} {unit}"
        )
        console.print(
            f"  {escape(change.name)}\n    {times}, {clock.ratio:.2f}x the time ({clock.low:.2f} to {clock.high:.2f})",
            highlight=False,
        )
    if len(changes) > _MOST_NAMES:
        console.print(f"  ... and {len(changes) - _MOST_NAMES} more")
