"""A result file: what was measured, sample by sample, on what, and what could not be. Everything published comes from such files."""

import re
from dataclasses import dataclass, field
from typing import Any

from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.timing import Timing


@dataclass(frozen=True)
class Result:
    """One implementation of one piece of work. What failed its parity check has no samples, only its failure.

    Attributes:
        op, shape, dtype, direction: what was done ("rms_norm", "Llama-3.1-8B, 8192 tokens", "bfloat16", "forward"); those of one
            piece of work share them.
        implementation: by whom.
        samples: seconds of a call, or of a token.
        error: relative RMS error against float64, of the worst output; `bound`: what it may be; `peer_error`: PyTorch's own there.
        read, written, flops: what must be done (`profiler.work`).
        floor_s: the least time for that by the measured limits.
        failure: why there are no samples.
        note: what else a reader must know ("peak memory 3.1 GiB").
    """

    op: str
    shape: str
    dtype: str
    direction: str
    implementation: str
    samples: list[float] = field(default_factory=list)
    error: float | None = None
    peer_error: float | None = None
    bound: float | None = None
    read: int = 0
    written: int = 0
    flops: int = 0
    floor_s: float = 0.0
    failure: str | None = None
    note: str | None = None

    @property
    def work_key(self) -> tuple[str, str, str, str]:
        """Equal for results of the same work."""
        return self.op, self.shape, self.dtype, self.direction

    @property
    def timing(self) -> Timing:
        assert self.samples, "a failed result has no timing"
        return Timing(tuple(self.samples))

    @property
    def gigabytes_per_s(self) -> float:
        return 1e-9 * (self.read + self.written) / self.timing.median

    @property
    def teraflops(self) -> float:
        return 1e-12 * self.flops / self.timing.median

    @property
    def share_of_limit(self) -> float:
        """Of what the machine can do: the floor over the measured time."""
        return self.floor_s / self.timing.median


@dataclass(frozen=True)
class Skipped:
    """An implementation that could not run, and why."""

    op: str
    implementation: str
    reason: str


@dataclass
class Record:
    """A result file, for `reports.jsonfile`."""

    machine: dict[str, Any]
    limits: Limits
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def machine_folder(machine: dict[str, Any]) -> str:
    """The folder of `results/` for the files of a machine: "nvidia-h100-80gb-hbm3", "cpu-amd-epyc-2-threads"."""
    name = machine.get("gpu") or f"cpu {machine['processor']} {machine['threads']} threads"
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
