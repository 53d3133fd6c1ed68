"""What result files say together: by device, op and piece of work."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llama_fast.benchmarks.peers import OURS
from llama_fast.benchmarks.report.tables import BASELINES, fits_cache, is_memory_bound
from llama_fast.benchmarks.suite.pytest_groups import SuiteRuns
from llama_fast.benchmarks.suite.record import Record, Result, machine_folder
from llama_fast.benchmarks.suite.sweep import Sweep
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.result import Profile
from llama_fast.profiler.significance import difference_in_turns
from llama_fast.reports.jsonfile import read_json

File = Record | Profile | SuiteRuns | Sweep

T = TypeVar("T")


def read_file(path: Path) -> File:
    """Any result file: its fields say which.

    Raises:
        ValueError: it is none, or of another version.
        OSError: it cannot be read.
    """
    try:
        fields = set(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:  # no JSON, no text, or a number
        raise ValueError(f"{path} is no result file of llama-fast: {error}") from None
    if "keys" in fields:
        return read_json(path, Sweep)
    if "runs" in fields:
        return read_json(path, Profile) if "trust" in fields else read_json(path, SuiteRuns)
    return read_json(path, Record)


_SIZES = re.compile(r"\b\d+ x \d+( -> \d+)?|\bcontext \d+|\b\d+( \+ \d+)? (tokens|rows)\b")


@dataclass(frozen=True)
class Contest:
    """One piece of work and who did it, in which run."""

    results: tuple[Result, ...]
    record: Record

    @property
    def op(self) -> str:
        return self.results[0].op

    @property
    def shape(self) -> str:
        return self.results[0].shape

    @property
    def dtype(self) -> str:
        return self.results[0].dtype

    @property
    def direction(self) -> str:
        return self.results[0].direction

    @property
    def kind(self) -> tuple[str, str]:
        """What a table holds: a direction and a dtype."""
        return self.direction, self.dtype

    @property
    def family(self) -> str:
        """The shape without what counts its size: the model, the matrix, the pattern."""
        return _SIZES.sub("", self.shape)

    @property
    def size(self) -> int:
        """To sort by."""
        return self.results[0].flops + self.results[0].read + self.results[0].written

    @property
    def timed(self) -> list[Result]:
        """Those that have samples, the fastest first."""
        return sorted((result for result in self.results if result.samples), key=lambda result: result.timing.median)

    @property
    def ours(self) -> Result | None:
        return next((result for result in self.results if result.implementation == OURS), None)

    @property
    def baseline(self) -> Result | None:
        """PyTorch's, or transformers', which the others are set in proportion to."""
        timed = {result.implementation: result for result in self.timed}
        return next((timed[name] for name in BASELINES if name in timed), None)

    @property
    def best_peer(self) -> Result | None:
        """The fastest that is not of llama-fast ("llama-fast paged" is)."""
        return next((result for result in self.timed if not result.implementation.startswith(OURS)), None)

    @property
    def verdict(self) -> str:
        """How ours stands to the fastest of the others: "faster", "even" or "slower"; "failed", or "alone" without one."""
        if self.ours is None or not self.ours.samples:
            return "failed" if self.ours is not None else "alone"
        if self.best_peer is None:
            return "alone"
        found = difference_in_turns(self.best_peer.samples, self.ours.samples)
        return "slower" if found.is_slower else "faster" if found.is_faster else "even"

    @property
    def is_memory_bound(self) -> bool:
        """Whether by the limits its bytes take longer than its FLOPs."""
        return is_memory_bound(self.results[0], self.record.limits)

    @property
    def has_limit(self) -> bool:
        """Whether the limits bound it: not those of memory, where a CPU's caches hold all."""
        return bool(self.results[0].floor_s) and not (self.is_memory_bound and fits_cache(self.results[0], self.record))


@dataclass(frozen=True)
class Device:
    """A machine and its files by name."""

    folder: str
    files: Mapping[str, File]

    def only(self, kind: type[T]) -> dict[str, T]:
        """Its files of a kind."""
        return {name: file for name, file in self.files.items() if isinstance(file, kind)}

    @property
    def limits(self) -> dict[str, Limits]:
        """By file, where there are some: the shares of a file's figures are of its own."""
        return {name: file.limits for name, file in self.files.items() if isinstance(file, Record | Profile)}

    @property
    def machine(self) -> dict[str, Any]:
        return next(iter(self.files.values())).machine

    @property
    def name(self) -> str:
        """As its maker calls it."""
        if "gpu" in self.machine:
            return str(self.machine["gpu"])
        threads = self.machine["threads"]
        return f"{self.machine['processor']}, {threads} thread{'' if threads == 1 else 's'}"

    @property
    def is_gpu(self) -> bool:
        return "gpu" in self.machine

    @property
    def contests(self) -> list[Contest]:
        """In the order of the files, then of their results.

        Raises:
            ValueError: two files have results of the same work: those were not measured in turns.
        """
        found: dict[tuple[str, str, str, str], tuple[str, Record, dict[str, Result]]] = {}
        for file, record in self.only(Record).items():
            for result in record.results:
                first, _, results = found.setdefault(result.work_key, (file, record, {}))
                if first != file or result.implementation in results:
                    what = ", ".join(result.work_key)
                    raise ValueError(f"{self.folder}: {first} and {file} both have results of {what}: remove one")
                results[result.implementation] = result
        return [Contest(tuple(results.values()), record) for _, record, results in found.values()]


def by_device(files: Mapping[str, File]) -> list[Device]:
    """Files by name, as devices: GPUs first, then by name."""
    folders: dict[str, dict[str, File]] = {}
    for name in sorted(files):
        folders.setdefault(machine_folder(files[name].machine), {})[name] = files[name]
    devices = [Device(folder, found) for folder, found in folders.items()]
    return sorted(devices, key=lambda device: (not device.is_gpu, device.folder))


def by_op(contests: Iterable[Contest], order: list[str]) -> dict[str, list[Contest]]:
    """In the order given, then by name; the sizes of one `family` beside each other, the smallest first."""
    groups: dict[str, list[Contest]] = {}
    for each in contests:
        groups.setdefault(each.op, []).append(each)
    ops = sorted(groups, key=lambda op: (order.index(op) if op in order else len(order), op))
    return {op: _by_size(groups[op]) for op in ops}


def _by_size(contests: list[Contest]) -> list[Contest]:
    smallest: dict[str, int] = {}
    for each in contests:
        smallest[each.family] = min(each.size, smallest.get(each.family, each.size))
    return sorted(contests, key=lambda each: (smallest[each.family], each.family, each.size, each.shape))


def kinds(contests: Iterable[Contest]) -> list[tuple[str, str]]:
    """The directions and dtypes that occur, forward first."""
    return sorted({each.kind for each in contests}, key=lambda kind: (kind[0] != "forward", kind))


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
