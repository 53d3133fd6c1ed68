"""A profile as one HTML page that needs nothing else: no network, no script, pictures of HTML and SVG, light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import log, log10
from typing import Any

from ...reports import units
from ...reports.pages import templates
from ..result import ContextPoint, Distribution, Profile, Run, Waterfall
from . import view


def page(profile: Profile) -> str:
    """The page's HTML. Whatever comes from outside (names of models, kernels, machines) is escaped."""
    environment = templates("llama_fast.profiler.report")
    environment.filters |= {
        "duration": units.duration, "size": units.size, "flops": units.flops, "number": units.number,
        "percent": units.percent, "tokens": units.tokens, "us": lambda seconds: units.number(1e6 * seconds),
    }  # fmt: skip
    environment.globals |= {"view": view, "stack": stack, "boxes": boxes, "rate": view.rate}
    groups = view.settings(profile)
    return environment.get_template("page.html.jinja").render(
        profile=profile, title=view.title(profile), groups=groups, subject=groups[0][0], charts=charts(profile.contexts),
        crossovers=view.crossover_lines(profile.contexts) if profile.contexts else [],
        gains=view.fusion_gains(profile), facts=view.facts(profile), kernel_name=lambda kernel: view.short(kernel.name, 40),
        what=view.computed_by(profile),
    )  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A piece of a stacked bar, in percent of the width."""

    kind: str
    left: float
    width: float
    seconds: float


def stack(runs: Sequence[Run], which: str) -> list[tuple[Run, list[Piece], float]]:
    """Each run's waterfall as one bar, parts of a kind together, and where what was measured ends; all on one scale.

    The bar reaches beyond that end by what a negative rest takes back.
    """
    waterfalls: list[tuple[Run, Waterfall]] = [(run, getattr(run, which)) for run in runs]
    kinds = [
        {kind: sum(p.seconds for p in waterfall.parts if p.kind == kind) for kind in view.KIND_NAMES}
        for _, waterfall in waterfalls
    ]
    longest = max(
        max(w.measured, sum(max(0.0, x) for x in of.values())) for (_, w), of in zip(waterfalls, kinds, strict=True)
    )
    bars = []
    for (run, waterfall), seconds in zip(waterfalls, kinds, strict=True):
        left, pieces = 0.0, []
        for kind in [kind for kind in seconds if seconds[kind] > 0]:
            pieces.append(Piece(kind, left, 100 * seconds[kind] / longest, seconds[kind]))
            left += pieces[-1].width
        bars.append((run, pieces, 100 * waterfall.measured / longest))
    return bars


def boxes(runs: Sequence[Run], metric: str) -> dict[str, dict[str, float]]:
    """By side: p20 to p80, median and p99 in percent of the width, on the scale of the slowest side."""
    of = {run.side: view.metrics(run.latency)[metric] for run in runs}
    longest = max(distribution.quantile(0.99) for distribution in of.values())

    def at(distribution: Distribution, q: float) -> float:
        return 100 * distribution.quantile(q) / longest

    return {
        side: {"low": at(d, 0.2), "high": at(d, 0.8), "median": at(d, 0.5), "p99": at(d, 0.99)}
        for side, d in of.items()
    }


@dataclass(frozen=True)
class Mark:
    """A point of a chart, in percent from the left and from below, with what a reader is told of it."""

    x: float
    y: float
    text: str
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Chart:
    """Seconds a token over context, on a logarithmic axis: the floor as areas, what was measured as marks.

    Attributes:
        weights, kv: outlines of the two areas, as an SVG polygon's points in a square of 100.
        series: marks by side, and the line through them.
        crossover: where keys and values outweigh the weights, if that is on the chart.
    """

    name: str
    weights: str
    kv: str
    series: list[tuple[str, list[Mark], str]]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    crossover: Mark | None


_REACH = 4  # an axis is made so much longer to show the crossover


def charts(points: Sequence[ContextPoint]) -> list[Chart]:
    """One for each batch."""
    ordered = sorted(points, key=lambda point: point.batch)
    return [_chart(list(group), batch) for batch, group in groupby(ordered, key=lambda point: point.batch)]


def _chart(points: list[ContextPoint], batch: int) -> Chart:
    subject = sorted((p for p in points if p.side == points[0].side), key=lambda p: p.context)
    contexts = sorted({p.context for p in points})
    crossover = view.crossover(subject)
    end = float(contexts[-1])
    if crossover is not None and end < crossover <= _REACH * end:
        end = 1.1 * crossover
    first = contexts[0] if contexts[0] < end else contexts[0] / 2
    slowest = max(p.measured.quantile(0.8) if p.measured else p.floor for p in points)
    top = 1.06 * max(slowest, _floor(subject, end)[1])

    def x(context: float) -> float:
        return 100 * log(context / first) / log(end / first)

    def y(seconds: float) -> float:
        return 100 * seconds / top

    along = [first * (end / first) ** (i / 60) for i in range(61)]
    floors = [(x(context), *map(y, _floor(subject, context))) for context in along]
    series = []
    for side, _ in view.sides(points):
        marks = [
            Mark(
                x(p.context), y(p.measured.median), f"{side}, {units.tokens(p.context)}: {units.duration(p.measured.median)}",
                y(p.measured.quantile(0.2)), y(p.measured.quantile(0.8)),
            )
            for p in points if p.side == side and p.measured
        ]  # fmt: skip
        series.append((side, marks, _svg([(mark.x, mark.y) for mark in marks])))
    at = crossover if crossover is not None and first <= crossover <= end else None
    return Chart(
        name=f"batch {batch}",
        weights=_svg([(0, 0), *((at, weights) for at, weights, _ in floors), (100, 0)]),
        kv=_svg([*((at, weights) for at, weights, _ in floors), *((at, both) for at, _, both in reversed(floors))]),
        series=series, x_ticks=_x_ticks(contexts, x),
        y_ticks=[Mark(0, y(value), units.duration(value) if value else "0") for value in _round_values(top)],
        crossover=None if at is None else Mark(x(at), y(_floor(subject, at)[1]), f"{units.number(at)} tokens"),
    )  # fmt: skip


def _floor(points: Sequence[ContextPoint], context: float) -> tuple[float, float]:
    """The floor of the weights, and of weights and cache, on lines through the points."""
    lines = list(pairwise(points)) or [(points[0], points[0])]
    low, high = next((line for line in lines if context <= line[1].context), lines[-1])
    share = (context - low.context) / max(1, high.context - low.context)
    weights = [p.floor * p.weight_bytes / max(1, p.weight_bytes + p.kv_bytes) for p in (low, high)]
    return weights[0] + share * (weights[1] - weights[0]), low.floor + share * (high.floor - low.floor)


def _svg(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{100 - y:.2f}" for x, y in points)


def _x_ticks(contexts: Sequence[int], x: Any) -> list[Mark]:
    """A label for each context measured, unless it would touch the one before."""
    ticks: list[Mark] = []
    for context in contexts:
        if not ticks or x(context) - ticks[-1].x > 9:
            ticks.append(Mark(x(context), 0, units.tokens(context)))
    return ticks


def _round_values(top: float) -> list[float]:
    """Three to six round values from zero to `top`."""
    step = 10.0 ** int(log10(top) // 1)
    step = next(step * factor for factor in (0.2, 0.5, 1, 2) if top / (step * factor) <= 6)
    return [i * step for i in range(int(top / step) + 1)]
