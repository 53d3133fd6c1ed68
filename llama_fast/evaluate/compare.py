"""What changed from one evaluation to another on the same examples, by paired bootstrap.

Each resample draws the same examples for both, so that what is hard for both is no noise. The first score of each task decides; where
several tasks decide, the confidence is that none of them is a false alarm (Bonferroni), with as many more resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from . import scores
from .bootstrap import CONFIDENCE, RESAMPLES, paired_interval
from .result import Evaluation, Score, TaskResult

FEW = 20
"""Fewer examples than these are a handful: their resamples know too little of others."""


@dataclass(frozen=True)
class Change:
    """A score before and after, and the interval of the difference; `decides` is true of the first of a task."""

    task: str
    score: str
    before: float
    after: float
    low: float
    high: float
    unit: str
    lower_is_better: bool
    decides: bool

    @property
    def verdict(self) -> str:
        """Says "better" or "worse" where all of the interval says so, else "same"."""
        if self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.high < 0) == self.lower_is_better else "worse"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `notes` are what a reader must know."""

    changes: list[Change]
    confidence: float
    notes: list[str]

    @property
    def is_worse(self) -> bool:
        return any(change.decides and change.verdict == "worse" for change in self.changes)


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Pairs the tasks by name, and their examples by place.

    Raises:
        ValueError: no task is in both; the examples of one differ; a score was made differently.
    """
    old = {task.name: task for task in before.tasks}
    pairs = [(old[task.name], task) for task in after.tasks if task.name in old]
    if not pairs:
        raise ValueError(
            f"no task is in both: {', '.join(old)} in the first, {', '.join(task.name for task in after.tasks)} in the second"
        )
    for a, b in pairs:
        _require_same_examples(a, b)
    changes = [change for a, b in pairs for change in _changes(a, b, deciding=len(pairs), seed=after.seed)]
    return Comparison(changes, 1 - (1 - CONFIDENCE) / len(pairs), _notes(before, after, pairs))


def _require_same_examples(before: TaskResult, after: TaskResult) -> None:
    same = "run both with the same task, --limit and --seed"
    a, b = before.examples, after.examples
    if len(a) != len(b):
        raise ValueError(f"{after.name} has {len(a)} examples in the first and {len(b)} in the second: {same}")
    for i, (old, new) in enumerate(zip(a, b, strict=True)):
        if (old.prompt, old.references) != (new.prompt, new.references):
            shown = [repr((each.prompt or each.references[0])[:60]) for each in (old, new)]
            raise ValueError(
                f"{after.name}: example {i} is {shown[0]} in the first and {shown[1]} in the second: {same}"
            )


def _changes(before: TaskResult, after: TaskResult, *, deciding: int, seed: int) -> list[Change]:
    old = {score.name: score for score in before.scores if score.low is not None}
    both = [score for score in after.scores if score.low is not None and score.name in old]
    if not both:
        raise ValueError(f"{after.name} has no score in both")
    return [_change(before, after, old[score.name], score, i == 0, deciding, seed) for i, score in enumerate(both)]


def _change(
    before: TaskResult, after: TaskResult, old: Score, new: Score, decides: bool, deciding: int, seed: int
) -> Change:
    if old.signature != new.signature:
        raise ValueError(f"{after.name}: {new.name} is {old.signature} in the first and {new.signature} in the second")
    (of,) = (figure.of for figure in scores.figures(new.metric) if figure.name == new.name)
    statistics = [[example.statistics[new.metric] for example in task.examples] for task in (before, after)]
    low, high = paired_interval(
        of, *statistics, resamples=RESAMPLES * deciding, seed=seed, confidence=1 - (1 - CONFIDENCE) / deciding
    )
    return Change(
        after.name, new.name, old.value, new.value, low, high, new.unit, new.lower_is_better, decides
    )  # fmt: skip


def _notes(before: Evaluation, after: Evaluation, pairs: Sequence[tuple[TaskResult, TaskResult]]) -> list[str]:
    notes = [
        f"{what} differs: {a} and {b}"
        for what, a, b in (
            ("the dtype", before.dtype, after.dtype), ("the device", before.device, after.device),
            *((name, before.versions.get(name), version) for name, version in after.versions.items()),
            *((f"{new.name}: {key}", old.settings.get(key), value) for old, new in pairs for key, value in new.settings.items()),
        )
        if a != b
    ]  # fmt: skip
    if before.fingerprint == after.fingerprint:
        notes.append("both are of the same model")
    notes += [
        f"{new.name} has {len(new.examples)} examples only: its intervals are no more than a hint"
        for _, new in pairs
        if len(new.examples) < FEW
    ]
    kept = {new.name for _, new in pairs}
    for which, evaluation in (("first", before), ("second", after)):
        if alone := [task.name for task in evaluation.tasks if task.name not in kept]:
            notes.append(f"only in the {which}: {', '.join(alone)}")
    return notes
