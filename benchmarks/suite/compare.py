"""What got faster or slower from one result file to another, beyond the noise.

A change counts if the clock shows it and if it is also there beside the other implementations of the same work, whose samples were
taken in turns with it: where PyTorch's own op got slower as well, the machine did. Of the others the one counts that moved least: a
peer that changed with its version excuses nothing. What is measured alone is judged by the clock.
"""

import math
import statistics
from dataclasses import dataclass, field

from llama_fast.benchmarks.peers import OURS
from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.profiler.machine import require_one_machine
from llama_fast.profiler.significance import MINIMUM_EFFECT, Difference, difference, minimum_effect

NOTICEABLE = 0.2

Key = tuple[str, str, str, str, str]
"""Op, shape, dtype, direction, implementation."""


@dataclass(frozen=True)
class Change:
    """A result that is in both files. `beside` is its change relative to the others of the same work, None without any.
    Other implementations of ours are not among ours' others."""

    before: Result
    after: Result
    by_clock: Difference
    beside: Difference | None

    @property
    def name(self) -> str:
        return ", ".join((*self.after.work_key, self.after.implementation))

    def is_real(self, *, absolute: bool) -> bool:
        """Whether it is beyond the noise: by the clock and, unless `absolute`, beside the others too."""
        if absolute or self.beside is None:
            return self.by_clock.is_significant
        return (self.by_clock.is_slower and self.beside.is_slower) or (
            self.by_clock.is_faster and self.beside.is_faster
        )

    @property
    def fell_behind(self) -> bool:
        """Whether only a machine that got faster may hide that it got slower."""
        return self.beside is not None and self.beside.is_slower and not self.by_clock.is_slower


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Changes are sorted, the largest first.

    Attributes:
        together: what moved by the clock, but with all that was measured beside it.
        behind: what got slower beside the others, but not by the clock.
        unchanged: how many did not move beyond the noise.
        blind: how many are so noisy, or so few samples, that a change of NOTICEABLE would not have been seen.
        newly_failing: results that fail now and did not.
        repaired, gone, new: names.
        drift: by what all results together moved, the median of their ratios.
        notes: what a reader must know of the two files.
    """

    slower: list[Change] = field(default_factory=list)
    faster: list[Change] = field(default_factory=list)
    together: list[Change] = field(default_factory=list)
    behind: list[Change] = field(default_factory=list)
    unchanged: int = 0
    blind: int = 0
    newly_failing: list[Result] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    drift: float = 1.0
    minimum: float = MINIMUM_EFFECT
    notes: list[str] = field(default_factory=list)

    @property
    def is_regression(self) -> bool:
        """Whether an implementation of ours is slower, or fails and did not. A peer's loss is told, and is no loss of ours."""
        return any(map(_is_ours, (change.after.implementation for change in self.slower))) or any(
            _is_ours(result.implementation) for result in self.newly_failing
        )


def compare(
    before: Record,
    after: Record,
    *,
    minimum: float | None = None,
    absolute: bool = False,
    across_machines: bool = False,
) -> Comparison:
    """Pairs the results of two files by work and implementation.

    Args:
        minimum: a change smaller than this share does not count; 3 % by default, 10 % on a CPU.
        absolute: judge by the clock alone, not beside what was measured in the same run.
        across_machines: compare even if the files are of two machines.

    Raises:
        ValueError: they are, or there is nothing to pair.
    """
    if not across_machines:
        require_one_machine(before.machine, after.machine)
    if minimum is None:
        minimum = minimum_effect(after.machine)
    old, new = _by_key(before), _by_key(after)
    both = [key for key in new if key in old]
    if not both:
        raise ValueError("the files have no work and implementation in common")
    timed = [key for key in both if old[key].samples and new[key].samples]
    changes = [_change(key, old, new, minimum, len(timed)) for key in timed]
    real = [change for change in changes if change.is_real(absolute=absolute)]
    behind = [] if absolute else [change for change in changes if change.fell_behind]
    together = [c for c in changes if c.by_clock.is_significant and c not in real and c not in behind]
    return Comparison(
        slower=_sorted([change for change in real if change.by_clock.is_slower]),
        faster=_sorted([change for change in real if change.by_clock.is_faster]),
        together=_sorted(together),
        behind=_sorted(behind),
        unchanged=len(changes) - len(real) - len(together) - len(behind),
        blind=sum(not change.by_clock.would_show(NOTICEABLE) for change in changes),
        newly_failing=[new[key] for key in both if _fails(new[key]) and not _fails(old[key])],
        repaired=[", ".join(key) for key in both if _fails(old[key]) and not _fails(new[key])],
        gone=[", ".join(key) for key in old if key not in new],
        new=[", ".join(key) for key in new if key not in old],
        drift=statistics.median(change.by_clock.ratio for change in changes) if changes else 1.0,
        minimum=minimum,
        notes=_notes(before, after),
    )


def _by_key(record: Record) -> dict[Key, Result]:
    return {(*result.work_key, result.implementation): result for result in record.results}


def _fails(result: Result) -> bool:
    return result.failure is not None


def _sorted(changes: list[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: -abs(math.log(change.by_clock.ratio)))


def _change(key: Key, old: dict[Key, Result], new: dict[Key, Result], minimum: float, comparisons: int) -> Change:
    def judged(before: list[float], after: list[float]) -> Difference:
        return difference(before, after, minimum=minimum, comparisons=comparisons)

    others = [
        other for other in new
        if other != key and other[:-1] == key[:-1] and new[other].samples and other in old and old[other].samples
        and not (_is_ours(key[-1]) and _is_ours(other[-1]))  # they share kernels: what slows one slows the other
    ]  # fmt: skip
    beside = None
    if others:
        steady = min(others, key=lambda other: abs(math.log(_median(new[other]) / _median(old[other]))))
        beside = judged(_relative(old[key], old[steady]), _relative(new[key], new[steady]))
    return Change(old[key], new[key], judged(old[key].samples, new[key].samples), beside)


def _is_ours(implementation: str) -> bool:
    return implementation.startswith(OURS)


def _median(result: Result) -> float:
    return max(result.timing.median, 1e-9)


def _relative(result: Result, other: Result) -> list[float]:
    """Each sample over what the other took in the same round, or over its median where rounds differ."""
    if len(result.samples) != len(other.samples):
        return [sample / _median(other) for sample in result.samples]
    return [sample / max(beside, 1e-9) for sample, beside in zip(result.samples, other.samples, strict=True)]


def _notes(before: Record, after: Record) -> list[str]:
    notes = []
    old, new = before.machine.get("versions", {}), after.machine.get("versions", {})
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            notes.append(f"{name} {old.get(name)} -> {new.get(name)}")
    if before.machine.get("threads") != after.machine.get("threads"):
        notes.append(f"{before.machine.get('threads')} -> {after.machine.get('threads')} CPU threads")
    if before.settings.get("quick") or after.settings.get("quick"):
        notes.append("--quick runs: few samples, so only large changes are seen")
    return notes
