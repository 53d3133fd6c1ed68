"""Runs tasks on a model, and makes scores with intervals of what they found."""

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..engine.llm import LLM
from ..environment import versions
from . import scores
from .bootstrap import RESAMPLES, score_interval
from .extra import PACKAGES
from .result import Evaluation, Score, TaskResult
from .tasks import Answers, Task, score_examples

Progress = Callable[[str, int, int], None]


def evaluate(
    llm: LLM, tasks: Sequence[Task], *, model: str, path: Path, seed: int = 0, resamples: int = RESAMPLES, command: str = "",
    progress: Progress = lambda *_: None, keep: Callable[[Evaluation], None] = lambda _: None,
) -> Evaluation:  # fmt: skip
    """Runs tasks one after the other.

    Args:
        llm: the engine.
        tasks: each with a name of its own.
        model, path: what the model is called, and where it lies (`checkpoint.find`).
        seed: of the bootstrap.
        resamples: of the bootstrap.
        command: what was typed.
        progress: is told a task's name, and how much of how much of it is done.
        keep: is given what is known after each task: a later one may fail, or be interrupted.

    Raises:
        ValueError: two tasks have one name, or a task does not fit the model.
    """
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tasks are called {twice[0]!r}: give one another name")
    evaluation = Evaluation(
        model, fingerprint(path), str(llm.device), str(llm.dtype).removeprefix("torch."), [], seed, resamples,
        versions() | {name: _version(name) for name in PACKAGES}, command,
    )  # fmt: skip
    for task in tasks:
        start = time.perf_counter()
        answers = task.run(llm, partial(progress, task.name))
        result = summed_up(task.name, answers, time.perf_counter() - start, seed=seed, resamples=resamples)
        evaluation = replace(evaluation, tasks=[*evaluation.tasks, result])
        keep(evaluation)
    return evaluation


def summed_up(name: str, answers: Answers, seconds: float, *, seed: int, resamples: int) -> TaskResult:
    """The scores of a task's answers, each with its interval."""
    found = []
    for metric in answers.metrics:
        statistics = [example.statistics[metric] for example in answers.examples]
        sums = [sum(column) for column in zip(*statistics, strict=True)]
        for figure in scores.figures(metric):
            low, high = score_interval(figure.of, statistics, resamples=resamples, seed=seed)
            value, signature = figure.of(sums, len(statistics)), answers.signatures.get(metric, "")
            lower = figure.lower_is_better or metric in answers.losses
            found.append(Score(figure.name, metric, value, low, high, figure.unit, lower, signature))
    return TaskResult(name, found + answers.fixed, answers.examples, answers.settings, seconds, answers.baselines)


def score_outputs(
    name: str, outputs: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str], *, seed: int = 0,
    resamples: int = RESAMPLES,
) -> TaskResult:  # fmt: skip
    """The scores of outputs that somebody has computed, each with its interval.

    Args:
        name: what they are called.
        outputs: at least one.
        references: for each output those that are right, at least one.
        metrics: of `scores.NAMES`, but "accuracy".
        seed, resamples: of the bootstrap.

    Raises:
        ValueError: there is no such metric.
    """
    scores.check_names(metrics)
    if "accuracy" in metrics:
        raise ValueError("accuracy is what a task's own checker says: score by exact_match or f1")
    answers = score_examples([""] * len(outputs), outputs, references, {
        metric: scores.measure(metric, outputs, references) for metric in metrics
    }, {})  # fmt: skip
    return summed_up(name, answers, 0.0, seed=seed, resamples=resamples)


def fingerprint(path: Path) -> str:
    """sha256 over the files of a model: all of a folder's that are no subfolder, by name."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
        digest.update(file.name.encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
