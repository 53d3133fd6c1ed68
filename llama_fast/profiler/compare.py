"""What changed from one profile to another, beyond the noise: latencies, kernel by kernel, and the parts of a token."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .machine import require_one_machine
from .report import view
from .result import Kernel, Profile, Run, Trust, Waterfall
from .significance import MINIMUM_EFFECT, Difference, difference, minimum_effect

NEGLIGIBLE = 1e-3
"""Of the time of all kernels."""

JUDGED = ("TTFT", "ITL")
"""What a regression is made of: the other latencies follow from these."""


@dataclass(frozen=True)
class Change:
    """Seconds before and after; zero where it was not there. `judged` is None where there are no samples to judge by."""

    name: str
    before: float
    after: float
    judged: Difference | None

    @property
    def seconds(self) -> float:
        return self.after - self.before

    @property
    def is_significant(self) -> bool:
        """Whether it came, went, or changed beyond the noise."""
        return (not self.before) != (not self.after) or (self.judged is not None and self.judged.is_significant)


@dataclass(frozen=True)
class RunChange:
    """One side at one setting.

    Attributes:
        latency: by METRIC_NAMES.
        kernels: of a token, the largest change first; `prompt_kernels`: of the prompt.
        token, first_token: the parts of the waterfalls, in their order; each is one figure, so none is judged.
    """

    side: str
    setting: str
    latency: list[Change]
    kernels: list[Change]
    prompt_kernels: list[Change]
    token: list[Change]
    first_token: list[Change]

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.latency if c.name in JUDGED and c.judged is not None and c.judged.is_slower]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        minimum: a change smaller than this share does not count.
        notes: what a reader must know.
        lost: what was right and is not any more, whatever the speed.
    """

    runs: list[RunChange]
    minimum: float
    notes: list[str]
    lost: list[str]

    @property
    def is_regression(self) -> bool:
        """Whether the subject's TTFT or ITL is slower, at any setting, or something is lost. Others are there to tell a change of
        the machine."""
        return bool(self.lost) or any(run.regressions for run in self.runs if run.side == self.runs[0].side)


def compare(
    before: Profile, after: Profile, *, minimum: float | None = None, across_machines: bool = False
) -> Comparison:
    """Pairs the runs of two profiles by side and setting.

    Args:
        minimum: a change smaller than this share does not count; 3 % by default, 10 % on a CPU.
        across_machines: compare even if they are of two machines.

    Raises:
        ValueError: they are, or no side was run at the same setting in both.
    """
    if not across_machines:
        require_one_machine(before.machine, after.machine)
    if minimum is None:
        minimum = minimum_effect(after.machine)
    old = {_key(run): run for run in before.runs}
    pairs = [(old[_key(run)], run) for run in after.runs if _key(run) in old]
    if not pairs:
        raise ValueError("no side was run with the same prompt, new tokens and batch in both profiles")
    runs = [_run_change(a, b, minimum, len(pairs)) for a, b in pairs]
    return Comparison(runs, minimum, _notes(before, after, runs), _lost(before.trust, after.trust))


def _key(run: Run) -> tuple[str, int, int, int]:
    return run.side, run.prompt_tokens, run.new_tokens, run.batch


def _run_change(before: Run, after: Run, minimum: float, runs: int) -> RunChange:
    a, b = view.metrics(before.latency), view.metrics(after.latency)
    latency = [
        _change(name, a[name].samples, b[name].samples, minimum, len(JUDGED) * runs) for name in view.METRIC_NAMES
    ]
    return RunChange(
        after.side, view.setting_name(after), latency,
        _kernels(before.kernels, after.kernels, minimum), _kernels(before.prompt_kernels, after.prompt_kernels, minimum),
        _parts(before.token, after.token), _parts(before.first_token, after.first_token),
    )  # fmt: skip


def _change(name: str, before: Sequence[float], after: Sequence[float], minimum: float, comparisons: int) -> Change:
    judged = difference(before, after, minimum=minimum, comparisons=comparisons)
    return Change(name, statistics.median(before), statistics.median(after), judged)


def _kernels(before: Sequence[Kernel], after: Sequence[Kernel], minimum: float) -> list[Change]:
    """By name and place. What changes all together by less than NEGLIGIBLE is no change, however sure it is."""
    a, b = ({f"{kernel.where}: {kernel.name}": kernel for kernel in kernels} for kernels in (before, after))
    least = NEGLIGIBLE * sum(kernel.seconds for kernel in before)
    changes = []
    for name in {**a, **b}:
        old, new = a.get(name), b.get(name)
        if old and new and old.samples and new.samples:
            enough = abs(new.seconds - old.seconds) > least
            changes.append(_change(name, old.samples, new.samples, minimum if enough else math.inf, len({**a, **b})))
        else:
            changes.append(Change(name, old.seconds if old else 0.0, new.seconds if new else 0.0, None))
    return sorted(changes, key=lambda change: -abs(change.seconds))


def _parts(before: Waterfall, after: Waterfall) -> list[Change]:
    a, b = _by_name(before), _by_name(after)
    return [Change(name, a.get(name, 0.0), b.get(name, 0.0), None) for name in {**b, **a}]


def _by_name(waterfall: Waterfall) -> Mapping[str, float]:
    seconds: dict[str, float] = {}
    for part in waterfall.parts:
        seconds[part.name] = seconds.get(part.name, 0.0) + part.seconds
    return seconds


def _notes(before: Profile, after: Profile, runs: Sequence[RunChange]) -> list[str]:
    notes = [
        f"{what} differs: {a} and {b}"
        for what, a, b in (
            ("the model", before.model, after.model), ("the dtype", before.dtype, after.dtype),
            *((name, before.machine.get("versions", {}).get(name), version) for name, version in after.machine.get("versions", {}).items()),
        )
        if a != b
    ]  # fmt: skip
    for which, profile in (("first", before), ("second", after)):
        if view.is_disturbed(profile):
            notes.append(f"the machine was too busy during the {which} profile: its figures are not to be believed")
    for run in runs:
        if run.side != runs[0].side and (slower := run.regressions):
            names = " and ".join(change.name for change in slower)
            notes.append(f"{run.side} got slower too ({names}; {run.setting}): the machine may have changed")
    kept = {_key(run) for run in after.runs}
    gone = [f"{run.side} ({view.setting_name(run)})" for run in before.runs if _key(run) not in kept]
    if gone:
        notes.append(f"only in the first profile: {', '.join(gone)}")
    rate = after.limits.read_bytes_per_s / before.limits.read_bytes_per_s
    if abs(rate - 1) > MINIMUM_EFFECT:
        notes.append(f"the machine's read stream is {rate:.2f}x what it was")
    return notes


def _lost(before: Trust, after: Trust) -> list[str]:
    claims = (
        ("the logits are no longer within their bound", before.logits_pass and after.logits_pass is False),
        ("two runs no longer give the same bits", before.same_bits and not after.same_bits),
    )
    return [claim for claim, is_lost in claims if is_lost]
