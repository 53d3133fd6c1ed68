"""What is written down: for each step what came in, what went out, and what was removed and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5
FAULTS_NAMED = 100
BINS = 48
"""Lengths in bytes are counted by half powers of two: bin i holds 2^(i/2) up to 2^((i+1)/2)."""


@dataclass
class Example:
    """A document that was removed: where it came from, and its first characters."""

    document: str
    text: str


@dataclass
class Removal:
    """All documents that a step removed for one reason."""

    reason: str
    documents: int
    examples: list[Example] = field(default_factory=list)


@dataclass
class Count:
    """How often a step did something within documents that it kept."""

    what: str
    times: int


@dataclass
class NamedFault:
    """A place where a file could not be read."""

    file: str
    line: int | None
    reason: str


@dataclass
class Step:
    """One step, over all tasks. Bytes are of text in UTF-8; seconds are summed over tasks."""

    stage: str
    name: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    lengths_in: list[int] = field(default_factory=lambda: [0] * BINS)
    lengths_out: list[int] = field(default_factory=lambda: [0] * BINS)
    changed: int = 0
    removed: list[Removal] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    faults: int = 0
    named_faults: list[NamedFault] = field(default_factory=list)

    @property
    def documents_removed(self) -> int:
        return sum(removal.documents for removal in self.removed)


@dataclass
class SourceShare:
    """A source in the mixture: what there was of it and what is in the shards, in tokens."""

    name: str
    weight: float
    tokens_before: int
    tokens_after: int


@dataclass
class Shards:
    """What a folder of shards holds. Bytes are those of the text in UTF-8."""

    folder: str
    files: int
    documents: int
    tokens: int
    bytes: int


@dataclass
class Report:
    """A whole run, as far as it has come."""

    config: str
    out: str
    versions: list[str]
    settings: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    held_out: list[Step] = field(default_factory=list)
    mixture: list[SourceShare] = field(default_factory=list)
    vocab_size: int | None = None
    shards: list[Shards] = field(default_factory=list)

    @property
    def read(self) -> Step | None:
        return self.steps[0] if self.steps else None

    @property
    def faults(self) -> list[NamedFault]:
        return [fault for step in (*self.steps, *self.held_out) for fault in step.named_faults]

    @property
    def fault_count(self) -> int:
        return sum(step.faults for step in (*self.steps, *self.held_out))


def merged(steps: Iterable[Step]) -> Step:
    """The same step of several tasks as one, in the order of the tasks."""
    first, *rest = steps
    total = first
    for step in rest:
        for name in ("documents_in", "documents_out", "bytes_in", "bytes_out", "seconds", "changed", "faults"):
            setattr(total, name, getattr(total, name) + getattr(step, name))
        total.lengths_in = [a + b for a, b in zip(total.lengths_in, step.lengths_in, strict=True)]
        total.lengths_out = [a + b for a, b in zip(total.lengths_out, step.lengths_out, strict=True)]
        _merge_removed(total.removed, step.removed)
        _merge_counts(total.counts, step.counts)
        total.named_faults = (total.named_faults + step.named_faults)[:FAULTS_NAMED]
    total.removed.sort(key=lambda removal: (-removal.documents, removal.reason))
    return total


def _merge_removed(total: list[Removal], more: list[Removal]) -> None:
    by_reason = {removal.reason: removal for removal in total}
    for removal in more:
        if removal.reason not in by_reason:
            total.append(removal)
            continue
        known = by_reason[removal.reason]
        known.documents += removal.documents
        known.examples = (known.examples + removal.examples)[:EXAMPLES]


def _merge_counts(total: list[Count], more: list[Count]) -> None:
    by_name = {count.what: count for count in total}
    for count in more:
        if count.what in by_name:
            by_name[count.what].times += count.times
        else:
            total.append(count)
