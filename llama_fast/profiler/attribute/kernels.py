"""The table of kernels (or PyTorch's operators) of a step, and how kernels of a replay are told which op they belong to.

A replay says nothing of ops: its kernels have names and times. The same step, run once op by op, launches the same kernels in the
same order, and there each is known by its launch. So the two lists are matched by order and name. Nothing here touches a device.
"""

import difflib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..measure.limits import Limits
from ..measure.work import NO_WORK, Work
from ..result import Kernel
from .counting import FORWARD, Op, counting_seconds

NOT_ATTRIBUTED = "not attributed"
VIEWS = "views"
"""The name of all ops that do no work, and take the host's time."""


@dataclass(frozen=True)
class Entry:
    """One kernel or op of a step: what it took and what it had to do.

    Attributes:
        seconds: of its own: a kernel that begins while the one before still runs counts from that one's end.
        gap: before it, while no kernel ran; on a CPU between two operators of the forward pass, with what timing them costs.
    """

    name: str
    where: str
    seconds: float
    work: Work = NO_WORK
    dtype: torch.dtype = torch.float32
    gap: float = 0.0


@dataclass(frozen=True)
class Event:
    """A kernel that ran; on a GPU also a copy or a fill. `op` is the number of the op that launched it, where that is known."""

    name: str
    start: float
    duration: float
    op: int | None = None

    @property
    def ended(self) -> float:
        return self.start + self.duration


def table(steps: Sequence[Sequence[Entry]], limits: Limits) -> list[Kernel]:
    """A row for each name and place, what could be won most first. Times are medians over the steps, work is the middle step's."""
    samples: dict[tuple[str, str], list[float]] = {}
    for i, step in enumerate(steps):
        for entry in step:
            of_steps = samples.setdefault((entry.name, entry.where), [0.0] * len(steps))
            of_steps[i] += entry.seconds
    middle = steps[len(steps) // 2] if steps else ()
    rows = []
    for (name, where), seconds in samples.items():
        same = [entry for entry in middle if (entry.name, entry.where) == (name, where)]
        work = sum((entry.work for entry in same), NO_WORK)
        floor = sum(floor_of(entry, limits) for entry in same)
        median = statistics.median(seconds)
        if same or median:
            rows.append(
                Kernel(
                    name, where, len(same), median, work.read, work.written, work.flops, floor, samples=tuple(seconds)
                )
            )
    return sorted(rows, key=lambda row: -row.winnable)


def floor_of(entry: Entry, limits: Limits) -> float:
    """The least time for an entry's work. The rate of a dtype that was not measured is taken to be float32's."""
    known = str(entry.dtype).removeprefix("torch.") in limits.matmul_flops_per_s
    return limits.floor_s(entry.work, entry.dtype if known else torch.float32)


def operator_entries(ops: Sequence[Op], timed: Sequence[Op]) -> list[Entry]:
    """The entries of a step run op by op on a CPU: work from the ops that were counted, times from the same step when it was only timed."""
    works: dict[tuple[str, str, int], Op] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for op in ops:
        works[op.name, op.where, seen[op.name, op.where]] = op
        seen[op.name, op.where] += 1
    entries, before = [], None
    seen.clear()
    for op in timed:
        gap = (
            op.ended - op.seconds - before.ended if before is not None and before.phase == op.phase == FORWARD else 0.0
        )
        before = op
        counted = works.get((op.name, op.where, seen[op.name, op.where]), op)
        seen[op.name, op.where] += 1
        seconds = max(0.0, op.seconds - counting_seconds())
        name = op.name if counted.work != NO_WORK else VIEWS
        entries.append(Entry(name, op.where, seconds, counted.work, counted.dtype, max(0.0, gap)))
    return entries


def kernel_entries(replayed: Sequence[Event], known: Sequence[Event], ops: Sequence[Op]) -> list[Entry]:
    """The entries of a step that was replayed, by those of the same step run op by op, whose `op` is known.

    The work of an op with several kernels stands at the one that takes longest in the replay.
    """
    replayed = sorted(replayed, key=lambda event: event.start)
    known = sorted((event for event in known if event.op is not None), key=lambda event: event.start)
    found = match([event.name for event in replayed], [event.name for event in known])
    ops_of = [None if at is None else known[at].op for at in found]
    entries, end = [], replayed[0].start if replayed else 0.0
    for event, number in zip(replayed, ops_of, strict=True):
        op = None if number is None else ops[number]
        entries.append(
            Entry(
                event.name, NOT_ATTRIBUTED if op is None else op.where, max(0.0, event.ended - max(event.start, end)),
                dtype=torch.float32 if op is None else op.dtype, gap=max(0.0, event.start - end),
            )
        )  # fmt: skip
        end = max(end, event.ended)
    longest: dict[int, int] = {}
    for i, number in enumerate(ops_of):
        if number is not None and (number not in longest or entries[i].seconds > entries[longest[number]].seconds):
            longest[number] = i
    for number, i in longest.items():
        entries[i] = replace(entries[i], work=ops[number].work)
    return entries


def match(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each of `names` the index of its counterpart in `known`, or None; no index twice.

    First by order: the longest common runs. What is left over has changed places, and is matched by name in order, if there are as
    many of that name on both sides: otherwise it cannot be told which is which.
    """
    found: list[int | None] = [None] * len(names)
    for block in difflib.SequenceMatcher(None, names, known, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            found[block.a + i] = block.b + i
    taken = {at for at in found if at is not None}
    left = [i for i, at in enumerate(found) if at is None]
    free = [at for at in range(len(known)) if at not in taken]
    for name in dict.fromkeys(names[i] for i in left):
        ours, theirs = [i for i in left if names[i] == name], [at for at in free if known[at] == name]
        if len(ours) == len(theirs):
            for i, at in zip(ours, theirs, strict=True):
                found[i] = at
    return found
