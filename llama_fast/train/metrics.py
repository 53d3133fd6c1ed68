"""metrics.csv: a line for each step, in a file that can be read while it grows."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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


NAMES = tuple(field.name for field in fields(StepMetrics))


class MetricsFile:
    """The file of a run, cut back to the lines up to `step`: what was done after the checkpoint is done again."""

    def __init__(self, path: Path, *, step: int) -> None:
        self._path = path
        kept = [
            line for line in _lines(path) if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= step
        ]
        write_whole(path, "".join(line + "\n" for line in [",".join(NAMES), *kept]))

    def append(self, metrics: StepMetrics) -> None:
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(asdict(metrics).values())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
