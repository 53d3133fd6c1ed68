"""An evaluation in a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..compare import Comparison
from ..result import Evaluation, TaskResult
from . import view

_STYLES = {"better": "green", "worse": "red", "same": ""}


def show(evaluation: Evaluation, console: Console) -> None:
    """Prints the scores of all tasks."""
    console.print(Text(view.title(evaluation), style="bold"), soft_wrap=True)
    show_scores(evaluation.tasks, console)


def show_scores(tasks: Sequence[TaskResult], console: Console) -> None:
    table = _table("score", "value", "95 % interval")
    for task in tasks:
        table.add_row(Text(f"{task.name}, {view.size(task)}", style="bold"))
        for score in task.scores:
            table.add_row(Text(f" {score.name}"), view.figure(score.value, score.unit), view.interval(score))
            for baseline in (each for each in task.baselines if each.score == score.name):
                table.add_row(Text(f"  {baseline.name}", style="dim"), view.figure(baseline.value, score.unit), "")
    console.print(table)
    signatures = [(score.name, score.signature) for task in tasks for score in task.scores if score.signature]
    for name, signature in dict.fromkeys(signatures):
        console.print(f"[dim]{name} {escape(signature)}[/]", highlight=False, soft_wrap=True)


def show_comparison(found: Comparison, console: Console) -> None:
    """Prints every change, and what a reader must know."""
    table = _table("score", "before", "after", "difference", "interval", "")
    last = None
    for change in found.changes:
        if change.task != last:
            table.add_row(Text(change.task, style="bold"))
        last = change.task
        low, high = (view.difference(x, change.unit) for x in (change.low, change.high))
        table.add_row(
            Text(f" {change.score}", style="bold" if change.decides else "dim"),
            view.figure(change.before, change.unit), view.figure(change.after, change.unit),
            view.difference(change.after - change.before, change.unit), f"{low} – {high}",
            Text(change.verdict, style=_STYLES[change.verdict]),
        )  # fmt: skip
    console.print(table)
    for note in found.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    console.print(
        f"{'WORSE' if found.is_worse else 'not worse'}, by the first score of each task, at {100 * found.confidence:.3g} %",
        highlight=False,
    )


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
