"""Plans that a sweep on a GPU found to be faster than what the arithmetic chooses: a table that the `plan_*` functions read.

`benchmarks/sweep.py` writes `tuned_plans.json`. An entry holds for one op, kind of GPU (architecture and number of
multiprocessors: an H100 SXM and an H200 count as one), dtype and size as the op's plan function names it; it says which parity
it passed, and what it and the arithmetic's choice took. What has no entry is planned by arithmetic. Nothing is tuned at call time.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .launch import Gpu

TABLE = Path(__file__).with_name("tuned_plans.json")

Plan = dict[str, int]
"""Tile sizes, warps, stages: by the names that the op's plan function gives them."""

Key = tuple[str, str, int, torch.dtype, tuple[int, ...]]
"""Op, architecture, multiprocessors, dtype, size."""

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """A line of the table. Times are medians in seconds, of the sizes in `cases` together; errors are relative to float64."""

    op: str
    arch: str
    multiprocessors: int
    dtype: str
    size: tuple[int, ...]
    plan: Plan
    gpu: str
    cases: tuple[str, ...]
    seconds: float
    arithmetic_seconds: float
    error: float
    bound: float

    @property
    def key(self) -> Key:
        return self.op, self.arch, self.multiprocessors, getattr(torch, self.dtype), self.size


def read_table(path: Path) -> list[Entry]:
    """Raises ValueError if it is none, or of another version."""
    try:
        table = json.loads(path.read_text())
        if table["schema"] != SCHEMA:
            raise ValueError(f"{path} is of schema {table['schema']}, and this version reads schema {SCHEMA}")
        return [
            Entry(**line | {"size": tuple(line["size"]), "cases": tuple(line["cases"])}) for line in table["entries"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of tuned plans: {type(error).__name__} {error}") from None


def write_table(path: Path, entries: list[Entry]) -> None:
    """Sorted, an entry a line: a new sweep shows as the lines that it changed."""
    ordered = sorted(entries, key=lambda entry: (entry.op, entry.arch, entry.multiprocessors, entry.dtype, entry.size))
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in ordered)
    path.write_text(f'{{"schema": {SCHEMA}, "entries": [\n{lines}\n]}}\n')


_plans: dict[Key, Plan] = {entry.key: entry.plan for entry in read_table(TABLE)}


def tuned_plan(op: str, gpu: Gpu, dtype: torch.dtype, size: tuple[int, ...]) -> Plan | None:
    """What the table says; None where it says nothing."""
    return _plans.get((op, gpu.arch, gpu.multiprocessors, dtype, size))


@contextmanager
def candidate(key: Key, plan: Plan | None) -> Iterator[None]:
    """Plans made inside are as if the table said so, or, for None, as if it said nothing."""
    present = _plans.pop(key, None)
    if plan is not None:
        _plans[key] = plan
    try:
        yield
    finally:
        _plans.pop(key, None)
        if present is not None:
            _plans[key] = present


class _Recorder(dict[Key, Plan]):
    """A table that notes what it is asked for."""

    def __init__(self, plans: dict[Key, Plan]) -> None:
        super().__init__(plans)
        self.asked: list[Key] = []

    def get(self, key: Key, default: Plan | None = None) -> Plan | None:  # type: ignore[override]
        self.asked.append(key)
        return super().get(key, default)


@contextmanager
def asked() -> Iterator[list[Key]]:
    """The keys that plans made inside look up, in order."""
    global _plans
    before = _plans
    _plans = recorder = _Recorder(before)
    try:
        yield recorder.asked
    finally:
        _plans = before
