"""A run as Markdown: the tables of the page, for a terminal or a repository."""

from collections.abc import Iterator, Sequence

from ...reports.units import duration, number, percent, size
from . import record
from .page import place, speed


def markdown(report: record.Report) -> str:
    """All of it, examples and faults too."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: record.Report) -> Iterator[str]:
    yield f"# Data: {_plain(report.config or report.out)}\n"
    yield from _table(
        ("step", "in", "removed", "out", "changed", "text in", "text out", "time", "speed"),
        [
            (
                f"{step.stage}: {step.name}", f"{step.documents_in:,}", f"{step.documents_removed:,}", f"{step.documents_out:,}",
                f"{step.changed:,}", size(step.bytes_in), size(step.bytes_out), duration(step.seconds), speed(step),
            )
            for step in report.steps
        ],
    )  # fmt: skip
    for count in (count for step in report.steps for count in step.counts):
        yield f"- masked {count.what}: {count.times:,}"
    for step in (step for step in report.steps if step.removed):
        yield f"\n## Removed by {step.name}: {step.documents_removed:,}, {percent(step.documents_removed / step.documents_in)}\n"
        for removal in step.removed:
            yield f"- **{_plain(removal.reason)}**: {removal.documents:,}"
            yield from (f"  - `{_plain(each.document)}` {_plain(each.text)[:100]}" for each in removal.examples)
    if report.fault_count:
        yield f"\n## Could not be read: {report.fault_count:,}\n"
        yield from (f"- `{_plain(place(fault))}` {_plain(fault.reason)}" for fault in report.faults)
    if report.shards:
        yield "\n## Shards\n"
        yield from _table(
            ("folder", "shards", "documents", "tokens", "bytes a token"),
            [
                (each.folder, f"{each.files:,}", f"{each.documents:,}", f"{each.tokens:,}", number(each.bytes / each.tokens))
                for each in report.shards if each.tokens
            ],
        )  # fmt: skip
    if report.mixture:
        total = sum(each.tokens_after for each in report.mixture)
        yield "\n## Mixture\n"
        yield from _table(
            ("source", "weight", "tokens", "used", "share"),
            [
                (each.name, number(each.weight), f"{each.tokens_before:,}", f"{each.tokens_after:,}", percent(each.tokens_after / total))
                for each in report.mixture
            ],
        )  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('---' if i == 0 else '---:' for i in range(len(header)))}|"
    yield from (f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)


def _plain(text: str) -> str:
    """On one line, and without what Markdown would read as its own."""
    return (
        " ".join(text.split())
        .replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("`", "'")
        .replace("*", "\\*")
    )
