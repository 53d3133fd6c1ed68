"""What a run writes down while it goes, in files that can be read while they grow.

    out/metrics.csv     a line for each step: the fields of `StepMetrics`
    out/samples.jsonl   a line for each evaluation: {"step": 100, "text": "..."}
    out/tensorboard/    the same for TensorBoard, where it is asked for

A run that goes on from a checkpoint cuts all of them back to its step: what was done after it is done again.
"""

import csv
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..reports.jsonfile import write_whole


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What is known of a step.

    Attributes:
        step: counted from 1.
        loss: nats a target token, the mean of the step's.
        gradient_norm: before clipping.
        learning_rate: of AdamW.
        skipped: whether the weights were left as they are.
        tokens: of the step.
        seconds: that it took, `data_seconds` of it for reading.
        bits_per_byte: of the validation shards, where they were read after this step.
        memory: bytes, the most that the process had so far.
        mfu: share of the machine's rate of products: see `speed`. None where that is not known.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    skipped: bool
    tokens: int
    seconds: float
    data_seconds: float
    bits_per_byte: float | None = None
    memory: int | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class Sample:
    """How the model went on with `run.sample` after a step."""

    step: int
    text: str


NAMES = tuple(field.name for field in fields(StepMetrics))
_KINDS = {field.name: field.type for field in fields(StepMetrics)}


class Journal:
    """The files of a run, cut back to `step`.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
        OSError: also of `append` and `add_sample`; what could not be written is written with what comes next.
    """

    def __init__(self, out: Path, *, step: int, tensorboard: bool = False) -> None:
        rows = [[row.get(name, "") for name in NAMES] for row in _rows(out / "metrics.csv") if int(row["step"]) <= step]
        self._metrics = _Lines(out / "metrics.csv", [_row(values) for values in (NAMES, *rows)])
        samples = [_line(sample) for sample in read_samples(out) if sample.step <= step]
        self._samples = _Lines(out / "samples.jsonl", samples)
        self._board = _board(out / "tensorboard", step) if tensorboard else None

    def append(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        self._metrics.add(_row("" if value is None else str(value) for value in values.values()))
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, float(value), metrics.step)

    def add_sample(self, sample: Sample) -> None:
        self._samples.add(_line(sample))
        if self._board is not None:
            self._board.add_text("sample", sample.text, sample.step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class _Lines:
    """A file that grows by whole lines: those that a full disk has no room for wait for the next ones."""

    def __init__(self, path: Path, lines: Iterable[str]) -> None:
        self._path, self._waiting = path, ""
        write_whole(path, "".join(lines))

    def add(self, line: str) -> None:
        self._waiting += line
        size = self._path.stat().st_size
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._waiting)
        except OSError:
            os.truncate(self._path, size)
            raise
        self._waiting = ""


def require_tensorboard() -> None:
    """Raises ValueError where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("run.tensorboard needs the package tensorboard: pip install tensorboard, or leave it out")


def read_metrics(out: Path) -> list[StepMetrics]:
    """The steps of a run. What an older version has not written is None."""
    return [
        StepMetrics(**{name: _value(name, row.get(name, "")) for name in NAMES}) for row in _rows(out / "metrics.csv")
    ]


def read_samples(out: Path) -> list[Sample]:
    path = out / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [Sample(**json.loads(line)) for line in lines if line.endswith("}")]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Whole lines: the last one may have been cut off."""
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            yield from (row for row in csv.DictReader(file) if row["step"].isdecimal() and None not in row.values())


def _value(name: str, text: str) -> Any:
    if not text:
        return None
    kind = _KINDS[name]
    return text == "True" if kind is bool else int(text) if kind in (int, int | None) else float(text)


def _row(values: Iterable[str]) -> str:
    return ",".join(values) + "\n"


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample), ensure_ascii=False) + "\n"


def _board(folder: Path, step: int) -> Any:
    """What was written after `step` is not shown."""
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
