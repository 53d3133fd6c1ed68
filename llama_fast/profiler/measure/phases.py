"""The phases of a step on the host, token by token: they fill the time between two tokens without a gap."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .sides import Generation

AFTER = "after"
"""From the last phase that was named to the moment the token was there."""


@dataclass
class Phases:
    """Notes when each phase ends: `side.watch(phases)`."""

    marks: list[tuple[str, float]] = field(default_factory=list)

    def __call__(self, name: str) -> None:
        self.marks.append((name, time.perf_counter()))


def phases_of_tokens(marks: Sequence[tuple[str, float]], generation: Generation) -> list[dict[str, float]]:
    """For each token the seconds of each phase since the token before (since the start for the first): they sum to all of it."""
    found: list[dict[str, float]] = []
    at, i = generation.start, 0
    for token in generation.times:
        end = generation.start + token
        seconds: dict[str, float] = {}
        while i < len(marks) and marks[i][1] <= end:
            name, when = marks[i]
            if when > at:
                seconds[name] = seconds.get(name, 0.0) + when - at
                at = when
            i += 1
        seconds[AFTER] = end - at
        at = end
        found.append(seconds)
    return found


def typical(samples: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Seconds of each phase in a step of median length: the mean over the tenth of (whole, phases) that is nearest to the median.

    Medians of parts don't sum to the median of the whole; means of the same few steps do.
    """
    median = statistics.median(whole for whole, _ in samples)
    middle = sorted(samples, key=lambda sample: abs(sample[0] - median))[: max(1, len(samples) // 10)]
    names = {name: None for _, phases in middle for name in phases}
    return {name: sum(phases.get(name, 0.0) for _, phases in middle) / len(middle) for name in names}
