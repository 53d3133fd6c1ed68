"""A profile in a terminal, 80 columns wide: the same pictures as on the page, in text."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...reports.units import duration, flops, number, percent, size, tokens
from ..compare import Change, Comparison, RunChange
from ..measure.limits import Limits
from ..result import ContextPoint, Kernel, Profile, Run, Waterfall
from . import view

KERNELS = 12
"""Rows of the kernel table; the page has them all."""

_BAR = 26  # characters
_COLORS = {
    "floor": "green", "inefficiency": "yellow", "gap": "red", "host": "magenta", "sampling": "cyan",
    "read-back": "blue", "text": "bright_blue", "compile": "bright_magenta", "rest": "bright_black",
}  # fmt: skip
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show(profile: Profile, console: Console) -> None:
    """Prints the whole summary."""
    console.print(Text(view.title(profile), style="bold"))
    if view.is_disturbed(profile):
        console.print(Text(view.BUSY, style="bold red"))
    for part in _parts(profile):
        console.print(part)
        console.print()


def _parts(profile: Profile) -> Iterator[RenderableType]:
    groups = view.settings(profile)
    for runs in groups:
        yield _latency(runs)
    subject = groups[0][0]
    yield _waterfall(f"Where a token's {duration(subject.token.measured)} go{view.doubt(subject)}", subject.token)
    yield _waterfall(
        f"Where the first token's {duration(subject.first_token.measured)} go{view.doubt(subject)}", subject.first_token
    )
    if subject.kernels:
        what = view.computed_by(profile).capitalize()
        yield _kernels(
            f"{what} of one decoding step, by what could be won{view.doubt(subject)}", subject.kernels, profile.limits
        )
    if profile.contexts:
        yield _contexts(profile.contexts)
    if profile.ablations:
        yield _ablations(profile)
    yield _trust(profile)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _latency(runs: Sequence[Run]) -> Table:
    versus = len(runs) > 1
    table = _table(
        f"Latency: {view.setting_name(runs[0])}", "", "mean", "median", "p90", "p99", "spread", *["ratio"] * versus
    )
    for metric in view.METRIC_NAMES:
        table.add_row(f"[bold]{metric}[/], {view.METRIC_NAMES[metric]}")
        for run in runs:
            d = view.metrics(run.latency)[metric]
            figures = [duration(x) for x in (d.mean, d.median, d.quantile(0.9), d.quantile(0.99))]
            ratio = [view.versus(run, runs[0], metric)] * versus
            table.add_row(f" {escape(run.side)}", *figures, percent(d.spread), *ratio)
    table.add_row("[bold]tokens/s[/], each and all")
    for run in runs:
        latency = run.latency
        table.add_row(f" {escape(run.side)}", "", number(latency.tokens_per_s), number(latency.total_tokens_per_s))
    table.add_row("[bold]TTFT, cold[/], the first one")
    for run in runs:
        table.add_row(f" {escape(run.side)}", "", duration(run.latency.cold_ttft))
    return table


def _waterfall(title: str, waterfall: Waterfall) -> RenderableType:
    drawn = view.steps(waterfall)
    table = _table(title, "part", drawn.unit, "share")
    table.add_column("", width=_BAR, no_wrap=True)
    for step in drawn.steps:
        table.add_row(
            escape(step.part.name), step.figure, percent(step.share),
            _bar(step.left, step.width, _COLORS[step.part.kind]),
        )  # fmt: skip
    table.add_section()
    table.add_row("[bold]sum = measured[/]", f"[bold]{drawn.total}[/]", "100 %")
    if not waterfall.hidden:
        return table
    hidden = ", ".join(f"{escape(part.name)} {duration(part.seconds)}" for part in waterfall.hidden)
    return Group(table, Text.from_markup(f"[dim]beside it, and in no sum: {hidden}[/]"))


def _bar(left: float, width: float, color: str) -> Text:
    """A bar that starts at a character and ends at an eighth of one; what is too short to be seen is a thin line."""
    start = min(round(left * _BAR), _BAR - 1)
    eighths = max(1, min(round(width * _BAR * 8), 8 * (_BAR - start)))
    return Text(" " * start + "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip(), style=color)


def _kernels(title: str, kernels: Sequence[Kernel], limits: Limits) -> Table:
    table = _table(title, "kernel", "calls", "µs", "bytes", "FLOP", "rate", "limit", "to win")
    shown = view.ranked(kernels)
    for kernel in shown[:KERNELS]:
        rate = view.rate(kernel, limits)
        moved = kernel.read + kernel.written
        table.add_row(
            f"{escape(kernel.where)}\n[dim]{escape(view.short(kernel.name))}[/]", str(kernel.calls),
            number(1e6 * kernel.seconds), size(moved) if moved else "", flops(kernel.flops).removesuffix("FLOP") if kernel.flops else "",
            rate.text, rate.share, number(1e6 * kernel.winnable),
        )  # fmt: skip
    if others := shown[KERNELS:]:
        table.add_row(
            f"[dim]{len(others)} others[/]", str(sum(kernel.calls for kernel in others)),
            number(1e6 * sum(kernel.seconds for kernel in others)), "", "", "", "",
            number(1e6 * sum(kernel.winnable for kernel in others)),
        )  # fmt: skip
    return table


def _contexts(points: Sequence[ContextPoint]) -> RenderableType:
    table = _table(
        "Distance to the limit over context", "side", "batch", "context", "weights", "KV", "floor", "measured", "limit"
    )
    for side, batch in view.sides(points):
        first = escape(side)
        for point in [point for point in points if (point.side, point.batch) == (side, batch)]:
            measured = point.measured.median if point.measured else None
            table.add_row(
                first, str(batch), tokens(point.context), size(point.weight_bytes), size(point.kv_bytes),
                duration(point.floor), duration(measured) if measured else "", percent(point.floor / measured) if measured else "",
            )  # fmt: skip
            first = ""
    return Group(table, *(Text(line, style="dim") for line in view.crossover_lines(points)))


def _ablations(profile: Profile) -> Table:
    table = _table("Each fusion off in turn: a token's time", "fusion", "on", "off", "gain", "")
    for gain in view.fusion_gains(profile):
        a, verdict = gain.ablation, gain.verdict
        color = {"gains": "green", "LOSES": "red"}.get(verdict, "dim")
        table.add_row(
            escape(a.fusion), duration(a.on.median), duration(a.off.median),
            f"{number(1e6 * a.gain)} µs, {percent(a.gain / a.off.median)}", f"[{color}]{verdict}[/]",
        )  # fmt: skip
    return table


def _trust(profile: Profile) -> Table:
    table = Table(
        title="Why to believe it", title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_column(max_width=30)
    table.add_column(overflow="fold")
    for name, value, good in view.facts(profile):
        color = {True: "green", False: "red"}.get(good) if good is not None else None
        table.add_row(name, f"[{color}]{escape(value)}[/]" if color else escape(value))
    for warning in profile.trust.warnings:
        table.add_row("[yellow]warning[/]", f"[yellow]{escape(warning)}[/]")
    table.add_row("repeat with", escape(profile.trust.command))
    return table


def show_comparison(found: Comparison, console: Console) -> None:
    """Prints what changed: all latencies and, of the subject, the kernels that changed and the parts that moved."""
    subject = found.runs[0].side
    for run in found.runs:
        table = _table(f"{run.side}: {run.setting}", "", "before", "after", "change", "interval, 99 %", "")
        for change in run.latency:
            table.add_row(change.name, *_change_cells(change))
        console.print(table, "")
        if run.side == subject:
            _show_causes(run, console)
    for note in found.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    slower = [(run, change) for run in found.runs if run.side == subject for change in run.regressions]
    for run, change in slower:
        console.print(f"[red]REGRESSION[/]: {change.name} of {escape(subject)}, {run.setting}", highlight=False)
    for lost in found.lost:
        console.print(f"[red]REGRESSION[/]: {lost}", highlight=False)
    if not found.is_regression:
        minimum = percent(found.minimum)
        console.print(f"[green]no regression[/] of TTFT or ITL beyond the noise and {minimum}", highlight=False)


def _show_causes(run: RunChange, console: Console) -> None:
    for name, kernels, parts in (
        ("token", run.kernels, run.token),
        ("first token", run.prompt_kernels, run.first_token),
    ):
        changed = [change for change in kernels if change.is_significant]
        if changed:
            console.print(_changed_kernels(f"kernels of the {name} that changed", changed))
        if kernels:
            console.print(
                f"[dim]{len(kernels) - len(changed)} of the {name}'s {len(kernels)} kernels did not change[/]\n"
            )
        total = sum(change.before for change in parts)
        moved = [change for change in parts if abs(change.seconds) > 0.01 * total]
        if moved:
            console.print(_moved_parts(f"parts of the {name} that moved by over 1 % of it", moved, total), "")


def _change_cells(change: Change) -> list[str]:
    cells = [duration(change.before) if change.before else "-", duration(change.after) if change.after else "-"]
    judged = change.judged
    if judged is None:
        return [*cells, "", "", "new" if not change.before else "gone" if not change.after else ""]
    verdict = "[red]slower[/]" if judged.is_slower else "[green]faster[/]" if judged.is_faster else "[dim]same[/]"
    interval = f"{100 * judged.low - 100:+.1f} to {100 * judged.high - 100:+.1f} %" if judged.low else "too few samples"
    return [*cells, f"{100 * judged.ratio - 100:+.1f} %", interval, verdict]


def _changed_kernels(title: str, changes: Sequence[Change]) -> Table:
    table = _table(title, "kernel", "before", "after", "change", "interval, 99 %", "")
    for change in changes:
        where, _, name = change.name.partition(": ")
        table.add_row(f"{escape(where)}\n[dim]{escape(view.short(name))}[/]", *_change_cells(change))
    return table


def _moved_parts(title: str, changes: Sequence[Change], total: float) -> Table:
    table = _table(title, "part", "before", "after", "change", "of the whole")
    for change in changes:
        figures = [duration(seconds) if seconds else "-" for seconds in (change.before, change.after)]
        sign = "+" if change.seconds > 0 else "-"
        table.add_row(
            escape(change.name), *figures, f"{sign}{duration(abs(change.seconds))}", percent(change.seconds / total)
        )
    return table
