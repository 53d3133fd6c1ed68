"""How figures of an evaluation are written, in a terminal and on the page."""

from ...reports.units import number, percent
from ..result import Evaluation, Example, Score, TaskResult

WORST = 10
"""Examples of a task on the page; the JSON file has all."""


def figure(value: float, unit: str) -> str:
    """Bits and nats with four decimals, a share as 92 %, BLEU as 37.21."""
    if unit == "share":
        return percent(value)
    return f"{value:.4f}" if unit else number(value, 4)


def difference(value: float, unit: str) -> str:
    """With its sign."""
    if unit == "share":
        return f"{100 * value:+.1f} %"
    return f"{value:+.4f}" if unit else f"{value:+.3f}"


def unit_of(task: TaskResult, score: str) -> str:
    return next(each.unit for each in task.scores if each.name == score)


def interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return ""
    return f"{figure(score.low, score.unit)} – {figure(score.high, score.unit)}"


def title(evaluation: Evaluation) -> str:
    return f"{evaluation.model}: {evaluation.dtype} on {evaluation.device}"


def size(task: TaskResult) -> str:
    """100 examples, or 12 passages."""
    what = "passage" if task.scores[0].metric == "perplexity" else "example"
    return f"{len(task.examples):,} {what}{'s' * (len(task.examples) != 1)}"


def worst(task: TaskResult) -> list[Example]:
    """The examples that score worst by the headline, the worst first, and none that is as good as it can be."""
    headline = task.scores[0]
    best = 100.0 if headline.name in ("BLEU", "chrF++") else 1.0
    sign = 1 if headline.lower_is_better else -1
    below = [
        example for example in task.examples
        if headline.name in example.scores and (headline.lower_is_better or example.scores[headline.name] < best - 1e-9)
    ]  # fmt: skip
    return sorted(below, key=lambda example: -sign * example.scores[headline.name])[:WORST]


def settings(task: TaskResult) -> str:
    """What differs from nothing: "window 512, stride 256"."""
    return ", ".join(f"{name} {value!r}" for name, value in task.settings.items() if value not in (None, False, [], ""))


def facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What the figures depend on."""
    return [
        ("model", evaluation.model), ("fingerprint", evaluation.fingerprint),
        ("computed", f"in {evaluation.dtype} on {evaluation.device}"),
        ("intervals", f"bootstrap, {evaluation.resamples:,} resamples, 95 %, seed {evaluation.seed}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())),
        ("repeat with", evaluation.command),
    ]  # fmt: skip
