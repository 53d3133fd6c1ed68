"""What a figure changes by from step to step, as a line in a box of 100 by 100 with the y axis down, and what stands beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...reports.units import number

BUCKETS = 200
"""Points of a line: of a longer run each is the mean of several steps, and the band around it is from the least to the most."""

Point = tuple[int, float]


@dataclass(frozen=True)
class Curve:
    """A line, ready to be drawn.

    Attributes:
        line, band: points of SVG, "x,y x,y ..."; the band is empty where each point is one step.
        dots: x, y and what a reader is told of the point, of curves that have few.
        ticks_x, ticks_y: place in percent, and label.
        last: the last value.
    """

    title: str
    unit: str
    line: str
    band: str
    dots: list[tuple[float, float, str]]
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    last: str


def curve(
    title: str, unit: str, points: Sequence[Point], *, steps: int, log: bool = False, from_zero: bool = False
) -> Curve | None:
    """Of (step, value); values that are not finite are left out, and of a logarithmic curve those that are not positive.

    None if nothing is left. `steps` is where the x axis ends.
    """
    points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
    if not points:
        return None
    each_has = -(-len(points) // BUCKETS)
    buckets = [points[i : i + each_has] for i in range(0, len(points), each_has)]
    scale = math.log10 if log else float
    values = [scale(y) for _, y in points] + [0.0] * from_zero
    ticks = log_ticks(min(values), max(values)) if log else linear_ticks(min(values), max(values))
    low, high = min([*values, ticks[0][0]]), max([*values, ticks[-1][0]])
    if high == low:
        low, high = low - 1, high + 1

    def place(x: float, y: float) -> tuple[float, float]:
        return round(100 * x / steps, 3), round(100 * (high - scale(y)) / (high - low), 3)

    middles = [(sum(x for x, _ in each) / len(each), [y for _, y in each]) for each in buckets]
    line = [place(x, sum(ys) / len(ys)) for x, ys in middles]
    band = [place(x, max(ys)) for x, ys in middles] + [place(x, min(ys)) for x, ys in reversed(middles)]
    dots = [(*place(x, y), f"step {x:,}: {number(y, 4)}") for x, y in points] if len(points) <= 60 else []
    return Curve(
        title, unit, _joined(line), _joined(band) if len(buckets) < len(points) else "", dots,
        [(100 * x / steps, f"{int(x):,}") for x, _ in linear_ticks(0, steps, whole=True) if x <= steps],
        [(100 * (high - y) / (high - low), label) for y, label in ticks],
        number(points[-1][1], 4),
    )  # fmt: skip


def linear_ticks(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """Two to six round numbers, of which the first is at most `low`'s and the last at least `high`'s neighbour; `whole` ones."""
    span = (high - low) or abs(high) or 1.0
    step = _round_up(span / 5)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(i * step, f"{i * step:,.{decimals}f}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """At powers of ten, or where these are less than two decades at 1, 2 and 5 of them too. They are given and told by their logarithms."""
    factors = (1, 10) if high - low > 2 else (1, 2, 5, 10)
    found = sorted(
        {decade + round(math.log10(f), 9) for decade in range(math.floor(low), math.ceil(high) + 1) for f in factors}
    )
    first = max(i for i, y in enumerate(found) if y <= low + 1e-9)
    last = min(i for i, y in enumerate(found) if y >= high - 1e-9)
    return [(y, f"{10**y:.3g}") for y in found[first : last + 1]]


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)
