"""Intervals by bootstrap: what the scores would be on other examples of the same kind.

Examples are drawn again with replacement, as many as there are. A score is made of the sums of its statistics over the examples, so
a resample is one weighted sum, and scores of a whole corpus (BLEU, perplexity) are resampled as such, never averaged.
Source: Koehn, Statistical significance tests for machine translation evaluation, 2004.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95

_DRAWN_AT_ONCE = 10_000_000  # counts, 80 MB

Floats = NDArray[np.float64]


def resampled_sums(statistics: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Floats]:
    """The sums over each resample of the examples.

    Args:
        statistics: (examples, statistics).
        resamples: how many.
        seed: the same seed draws the same examples.

    Yields:
        (statistics,), `resamples` times.
    """
    generator = np.random.default_rng(seed)
    examples = len(statistics)
    at_once = max(1, _DRAWN_AT_ONCE // examples)
    for start in range(0, resamples, at_once):
        times = generator.multinomial(examples, np.full(examples, 1 / examples), size=min(at_once, resamples - start))
        yield from times @ statistics


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """What `confidence` of the resampled values lie between."""
    low, high = np.quantile(np.asarray(values), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def score_interval(
    of: Callable[[Sequence[float], int], float], statistics: Sequence[Sequence[float]], *,
    resamples: int = RESAMPLES, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """The interval of a score, `of` the sums of its statistics and the number of examples."""
    table = np.asarray(statistics, dtype=np.float64)
    sums = resampled_sums(table, resamples=resamples, seed=seed)
    return interval([of(each.tolist(), len(table)) for each in sums])


def paired_interval(
    of: Callable[[Sequence[float], int], float], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *,
    resamples: int = RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE,
) -> tuple[float, float]:  # fmt: skip
    """The interval of the difference `after - before` of a score on the same examples: each resample draws the same ones for both."""
    table = np.asarray([[*a, *b] for a, b in zip(before, after, strict=True)], dtype=np.float64)
    width = len(before[0])
    differences = [
        of(sums[width:].tolist(), len(table)) - of(sums[:width].tolist(), len(table))
        for sums in resampled_sums(table, resamples=resamples, seed=seed)
    ]
    return interval(differences, confidence)
