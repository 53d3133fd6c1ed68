"""The phases of a step on the host, token by token: they fill the time between two tokens without a gap."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from .sides import Generation

AFTER = "after"
"""From the last phase that was named to the moment the token was there."""


class _Ended(Protocol):
    @property
    def ended(self) -> float: ...


T = TypeVar("T", bound=_Ended)


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


def by_token(ended: Sequence[T], generation: Generation) -> list[list[T]]:
    """What ended before each token and after the one before it. `ended` are in order."""
    of_tokens: list[list[T]] = [[] for _ in generation.times]
    i = 0
    for each in ended:
        while i < len(of_tokens) and each.ended > generation.start + generation.times[i]:
            i += 1
        if i < len(of_tokens):
            of_tokens[i].append(each)
    return of_tokens


def typical(samples: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Seconds of each phase in a step of median length: the mean over the tenth of (whole, phases) that is nearest to the median.

    Medians of parts don't sum to the median of the whole; means of the same few steps do.
    """
    median = statistics.median(whole for whole, _ in samples)
    middle = sorted(samples, key=lambda sample: abs(sample[0] - median))[: max(1, len(samples) // 10)]
    names = {name: None for _, phases in middle for name in phases}
    return {name: sum(phases.get(name, 0.0) for _, phases in middle) / len(middle) for name in names}
