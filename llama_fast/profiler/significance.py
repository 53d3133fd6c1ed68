"""Whether two series of timings differ by more than their noise, and by how much.

Yuen's test, Welch's with trimmed means, on the logarithms of the samples: a fifth of them at either end are outliers (an
interrupt, another process) and do not count, the two series may have different noise, and five samples are enough. Samples
taken one after the other are alike, which would make an interval too narrow: a long series is cut into BLOCKS runs of
neighbours, the median of each stands for it, and where these are still alike the variance is that of a first-order
autoregressive series of their correlation.

What no test on two series can see is a drift slower than the series, or that two processes differ from each other (where their
memory lies, what else the machine does): that is what the minimum effect is for. Source: Yuen, The two-sample trimmed t for unequal population variances, 1974.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCKS = 16
TRIMMED = 0.2
"""Of the samples, at either end."""

MINIMUM_EFFECT = 0.03
MINIMUM_EFFECT_ON_CPU = 0.1
"""Two runs of the same code differ by more there: other processes share its caches and clock."""

CONFIDENCE = 0.99

_MOST_ALIKE = 0.9  # correlation of neighbouring blocks: their variance counts 19-fold then
_SHORTEST = 1e-9  # a sample of 0 is one that the clock did not see


def minimum_effect(machine: Mapping[str, Any]) -> float:
    """The smallest change that counts, between files of this machine."""
    return MINIMUM_EFFECT if "gpu" in machine else MINIMUM_EFFECT_ON_CPU


@dataclass(frozen=True)
class Difference:
    """How `after` stands to `before`.

    Attributes:
        ratio: of the times: 1.2 is slower by 20 %.
        low, high: its confidence interval: 0 and infinity where there are too few samples to tell.
        minimum: a change smaller than this share does not count, however sure it is.
    """

    ratio: float
    low: float
    high: float
    minimum: float

    @property
    def is_significant(self) -> bool:
        """Whether it is beyond the noise, and at least the minimum."""
        return (self.low > 1 or self.high < 1) and max(self.ratio, 1 / self.ratio) >= 1 + self.minimum

    def would_show(self, share: float) -> bool:
        """Whether a change of so much would stand out of the noise."""
        return self.high <= self.ratio * (1 + share)

    @property
    def is_slower(self) -> bool:
        return self.is_significant and self.ratio > 1

    @property
    def is_faster(self) -> bool:
        return self.is_significant and self.ratio < 1


def difference(
    before: Sequence[float], after: Sequence[float], *,
    minimum: float = MINIMUM_EFFECT, confidence: float = CONFIDENCE, comparisons: int = 1,
) -> Difference:  # fmt: skip
    """Compares two series of samples in the order they were taken, in any unit.

    With `comparisons` this is one of so many that are looked at together: `confidence` is that none of them is a false
    alarm (Bonferroni).

    Raises:
        ValueError: a series is empty.
    """
    if not before or not after:
        raise ValueError(f"each side needs a sample, got {len(before)} and {len(after)}")
    (mean_a, error_a, degrees_a), (mean_b, error_b, degrees_b) = map(_trimmed_mean, (before, after))
    ratio, error = math.exp(mean_b - mean_a), error_a + error_b
    if not degrees_a or not degrees_b:
        return Difference(ratio, 0.0, math.inf, minimum)
    if not error:
        return Difference(ratio, ratio, ratio, minimum)
    degrees = error**2 / (error_a**2 / degrees_a + error_b**2 / degrees_b)
    margin = _t_quantile((1 - confidence) / max(1, comparisons), degrees) * math.sqrt(error)
    # past e^700 a float is infinite, and an interval of that size says nothing anyway
    return Difference(ratio, ratio * math.exp(-min(margin, 300)), ratio * math.exp(min(margin, 300)), minimum)


def difference_in_turns(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Of samples that were taken in turns: round by round, so that what the machine did to both is no noise."""
    if len(before) != len(after):
        return difference(before, after)
    return difference([1.0] * len(before), [b / max(a, _SHORTEST) for a, b in zip(before, after, strict=True)])


def _trimmed_mean(samples: Sequence[float]) -> tuple[float, float, int]:
    """The trimmed mean of the logarithms, its squared standard error, and its degrees of freedom."""
    logs = [math.log(max(x, _SHORTEST)) for x in _blocks(samples)]
    cut = int(TRIMMED * len(logs))
    kept = sorted(logs)[cut : len(logs) - cut]
    if len(kept) < 2:
        return statistics.fmean(kept), 0.0, 0
    winsorized = [min(max(x, kept[0]), kept[-1]) for x in logs]
    mean = statistics.fmean(winsorized)
    deviations = [x - mean for x in winsorized]
    squares = math.fsum(x * x for x in deviations)
    if not squares:
        return mean, 0.0, len(kept) - 1
    alike = sum(a * b for a, b in itertools.pairwise(deviations)) / squares
    alike = min(max(alike, 0.0), _MOST_ALIKE)
    variance = squares / (len(kept) * (len(kept) - 1)) * (1 + alike) / (1 - alike)
    return statistics.fmean(kept), variance, len(kept) - 1


def _blocks(samples: Sequence[float]) -> list[float]:
    count = min(BLOCKS, len(samples))
    edges = [i * len(samples) // count for i in range(count + 1)]
    return [statistics.median(samples[start:end]) for start, end in itertools.pairwise(edges)]


def _t_quantile(p: float, degrees: float) -> float:
    """The t beyond which, on either side together, lies a share `p` of Student's distribution.

    With t = sqrt(degrees) * tan(angle) its density is that of cos(angle)^(degrees - 1).
    """
    total = _cosine_power(0.0, degrees - 1)
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _cosine_power(middle, degrees - 1) > p * total else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _cosine_power(start: float, power: float, steps: int = 200) -> float:
    """The integral of cos^power from `start` to pi/2, by Simpson's rule."""
    width = (math.pi / 2 - start) / steps
    values: list[float] = [max(0.0, math.cos(start + i * width)) ** power for i in range(steps + 1)]
    return width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
