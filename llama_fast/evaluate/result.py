"""What an evaluation found: every example, what was made of it, and how sure the scores are."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One prompt, or one passage of a text.

    Attributes:
        prompt: what the model was given, before a chat template was put around it; of a passage nothing.
        references: what it should have written; of a passage the passage.
        output: what it wrote; of a passage nothing.
        statistics: by metric: what its scores are made of when they are summed over examples (`scores.figures`).
        scores: what the example alone scores, by the name of the score.
    """

    prompt: str
    references: list[str]
    output: str
    statistics: dict[str, list[float]]
    scores: dict[str, float]


@dataclass(frozen=True)
class Score:
    """A score over all examples of a task.

    Attributes:
        name: "bits per byte", "BLEU", ...
        metric: whose statistics it is made of.
        value: shares are from 0 to 1; BLEU and chrF from 0 to 100.
        low, high: the interval, by bootstrap at 95 %; None where its statistics are not known.
        unit: "share", "bits/byte", "nats/token" or "".
        lower_is_better: of losses.
        signature: how it was made, for BLEU and chrF as sacrebleu writes it.
    """

    name: str
    metric: str
    value: float
    low: float | None
    high: float | None
    unit: str
    lower_is_better: bool
    signature: str


@dataclass(frozen=True)
class Baseline:
    """What something that is no model scores on the same text."""

    name: str
    score: str
    value: float


@dataclass(frozen=True)
class TaskResult:
    """A task.

    Attributes:
        scores: the first is the headline.
        settings: how it was run.
        seconds: what it took.
    """

    name: str
    scores: list[Score]
    examples: list[Example]
    settings: dict[str, Any]
    seconds: float
    baselines: list[Baseline] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """All tasks of one run: what `llama-fast eval` writes as evaluation.json.

    Attributes:
        model: as it was named.
        fingerprint: sha256 of the model's files.
        device, dtype: what it was computed on and in.
        seed: of the bootstrap, and of the examples where a task draws them.
        resamples: of the bootstrap.
        versions: of Python and of the packages whose version can change a figure.
        command: what was typed, or "".
    """

    model: str
    fingerprint: str
    device: str
    dtype: str
    tasks: list[TaskResult]
    seed: int
    resamples: int
    versions: dict[str, str]
    command: str
