"""What an output folder was made of: settings and inputs of each step, so that it is never continued with others."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from ...reports.jsonfile import read_json, write_json

_SHOWN = 8


@dataclass
class StepState:
    """A step that has begun: what it was told and given, and whether it ended."""

    name: str
    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    complete: bool = False


@dataclass
class State:
    """All steps that have begun, in their order."""

    steps: list[StepState] = field(default_factory=list)

    def find(self, name: str) -> StepState | None:
        return next((step for step in self.steps if step.name == name), None)


def read_state(path: Path) -> State:
    return read_json(path, State) if path.exists() else State()


def _write(path: Path, state: State) -> None:
    write_json(path, state, exact=True)  # a setting that was rounded would be another one


def begin(path: Path, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> StepState:
    """Notes that a step begins, or finds it begun.

    Raises:
        ValueError: it was begun with other settings or other inputs; says which.
    """
    state = read_state(path)
    now = StepState(name, flat(settings), dict(inputs))
    before = state.find(name)
    if before is None:
        state.steps.append(now)
        _write(path, state)
        return now
    if changes := list(_changes(before, now)):
        more = f", and {len(changes) - _SHOWN} more changes" if len(changes) > _SHOWN else ""
        raise ValueError(
            f"{path.parent} holds results of other settings or inputs (step {name}): {'; '.join(changes[:_SHOWN])}{more}. "
            f"Choose another `out`, or do this step and those after it again with --redo {name}"
        )
    return before


def end(path: Path, name: str) -> None:
    """Notes that a step is complete."""
    state = read_state(path)
    step = state.find(name)
    assert step is not None
    step.complete = True
    _write(path, state)


def forget(path: Path, names: list[str]) -> None:
    """As if these steps had never begun."""
    state = read_state(path)
    state.steps = [step for step in state.steps if step.name not in names]
    if path.exists():
        _write(path, state)


def _changes(before: StepState, now: StepState) -> Iterator[str]:
    for key in sorted(before.settings.keys() | now.settings.keys()):
        old, new = before.settings.get(key), now.settings.get(key)
        if old != new:
            yield f"{key} was {_said(old)} and is {_said(new)}"
    for file in sorted(before.inputs.keys() | now.inputs.keys()):
        if file not in now.inputs:
            yield f"{file} is no longer there"
        elif file not in before.inputs:
            yield f"{file} is new"
        elif before.inputs[file] != now.inputs[file]:
            yield f"{file} has changed"


def _said(value: Any) -> str:
    return "not set" if value is None else repr(value)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, keys joined by dots: {"dedup.ngram": 5}. Lists are counted from 0."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        pairs = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [(str(i), each) for i, each in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, each in pairs:
        found |= flat(each, f"{prefix}.{key}" if prefix else key)
    return found


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds an output folder for this process; the kernel lets go of it however the process ends.

    Raises:
        ValueError: another process holds it.
    """
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 20, 0).decode() or "unknown"
            raise ValueError(f"another run (process {owner}) is at work in {folder}") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)
