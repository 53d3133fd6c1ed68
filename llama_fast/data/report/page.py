"""A run as one HTML page that needs nothing else: no network, no script, plots as SVG, light and dark."""

from dataclasses import dataclass

from ...reports import units
from ...reports.pages import templates
from . import record


def page(report: record.Report) -> str:
    """The page's HTML. Whatever comes from documents is escaped."""
    environment = templates("llama_fast.data.report")
    environment.filters |= {
        "size": units.size, "duration": units.duration, "percent": units.percent, "number": units.number, "count": count,
    }  # fmt: skip
    steps = report.steps
    plots = [
        histogram(name, before.lengths_out, after.lengths_out)
        for name, before, after in (
            [("as read, and after the last step", steps[0], steps[-1])] if len(steps) > 1 else []
        )
    ]
    return environment.get_template("page.html.jinja").render(
        report=report, steps=steps, plots=plots, removing=[step for step in steps if step.removed], speed=speed,
        first=steps[0] if steps else None, last=steps[-1] if steps else None, place=place,
    )  # fmt: skip


def count(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def speed(step: record.Step) -> str:
    """Text a second and process."""
    return units.size(step.bytes_in / step.seconds) + "/s" if step.seconds > 1e-6 and step.bytes_in else "–"


def place(fault: record.NamedFault) -> str:
    """file:line, or the file."""
    return fault.file if fault.line is None else f"{fault.file}:{fault.line}"


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram, in percent of the plot: where it stands, and its height before and after."""

    left: float
    width: float
    before: float
    after: float
    title: str


@dataclass(frozen=True)
class Plot:
    """Lengths of documents, in bins of half powers of two."""

    name: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    most: int


def histogram(name: str, before: list[int], after: list[int]) -> Plot | None:
    """Lengths before and after, from the first bin that holds any to the last. None if there are none."""
    filled = [i for i in range(record.BINS) if before[i] or after[i]]
    if not filled:
        return None
    first, end = filled[0] // 2 * 2, filled[-1] + 1
    end += end % 2
    width, most = 100 / (end - first), max(before + after)
    bars = [
        Bar(
            (i - first) * width, width, 100 * before[i] / most, 100 * after[i] / most,
            f"{units.size(2 ** (i / 2))} to {units.size(2 ** ((i + 1) / 2))}: {before[i]:,}, then {after[i]:,}",
        )
        for i in range(first, end)
    ]  # fmt: skip
    every = 2 * max(1, (end - first) // 16)
    ticks = [((i - first) * width, units.size(2 ** (i / 2))) for i in range(first, end + 1, every)]
    return Plot(name, bars, ticks, most)
