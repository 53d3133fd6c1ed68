"""`llama-fast data`: from raw text to shards of tokens, in steps that can be run one by one."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .common import Command, Group, console, errors, fail

if TYPE_CHECKING:
    from ..data.report.record import Report
    from ..data.run.pipeline import Progress as Show
    from ..data.run.pipeline import Run


class Kind(StrEnum):
    """Where steps run."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


class StepName(StrEnum):
    """The steps, in their order."""

    collect = "collect"
    clean = "clean"
    dedup = "dedup"
    tokenizer = "tokenizer"
    tokenize = "tokenize"


app = typer.Typer(
    cls=Group,
    help="From raw text to shards of tokens: collect, clean, dedup, tokenizer, tokenize; run does all.",
    no_args_is_help=True,
    add_completion=False,
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file; see docs/data.md.", show_default=False)
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set dedup.ngram=8. Repeatable.")
]  # fmt: skip
ExecutorName = Annotated[
    Kind | None, typer.Option("--executor", help="What runs the steps; the file's choice by default.", show_default=False)
]  # fmt: skip
MaxBad = Annotated[str, typer.Option("--max-bad", help="Stop if more lines or files than this cannot be read.")]
Redo = Annotated[
    StepName | None, typer.Option("--redo", help="Forget this step and those after it, and do them again.")
]


def _command(name: str, steps: slice, text: str) -> None:
    """One command for a step: they differ in nothing but which steps they run."""

    def command(
        config: ConfigFile,
        settings: Settings = None,
        executor: ExecutorName = None,
        max_bad: MaxBad = "1%",
        redo: Redo = None,
    ) -> None:
        _run(config, steps, settings, executor, max_bad, redo)

    app.command(name, cls=Command, help=text)(command)


@app.command(cls=Command)
def collect(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A TOML file; see docs/data.md.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Instead of a file: fetch text by name into the cache, and say where it is.")
    ] = None,
    settings: Settings = None,
    executor: ExecutorName = None,
    max_bad: MaxBad = "1%",
    redo: Redo = None,
) -> None:
    """Read all sources into documents; what cannot be read is named and left out."""
    if (config is None) == (source is None):
        raise fail("collect takes either a CONFIG or --source NAME")
    if config is not None:
        _run(config, slice(0, 1), settings, executor, max_bad, redo)
        return
    assert source is not None
    with _user_errors():
        from ..data.sources import collect as fetch

        folder = fetch(source)
    files = sorted(folder.rglob("*.jsonl"))
    console.print(f"{source}: {len(files)} files in {folder}", highlight=False, soft_wrap=True, markup=False)


_command("clean", slice(1, 2), "Clean what was collected, and remove what the filters name.")
_command("dedup", slice(2, 3), "Remove doubles: exact ones, then near ones by MinHash.")
_command("tokenizer", slice(3, 4), "Train a tokenizer on what is left, or take an existing one.")
_command("tokenize", slice(4, 5), "Mix sources by weight, and write shards of tokens.")
_command("run", slice(0, 5), "All steps, from files to shards. What is complete is not done again.")


def _run(
    file: Path, steps: slice, settings: list[str] | None, executor: Kind | None, max_bad: str, redo: StepName | None
) -> None:  # fmt: skip
    from ..config_file import read_config

    share = _share(max_bad)
    changes = [*(settings or []), *([f'executor.kind="{executor.value}"'] if executor else [])]
    with _user_errors():
        from ..data.config import Config
        from ..data.report.files import write_report
        from ..data.run.pipeline import STEPS, Run

        config = read_config(file, Config, changes)
        with _progress() as show:
            run = Run(config, max_bad=share, progress=show, named=str(file))
            try:
                run.run(STEPS[steps], redo=redo.value if redo else None)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise ValueError(
                        f"the disk of {config.out} is full. Tasks that are complete are kept and nothing else counts: make room, "
                        "and run the same command again"
                    ) from None
                raise
            finally:
                _leave_report(run)
        report = run.report()
        write_report(report, run.out)
    _print(report)
    console.print(f"report: {Path(config.out, 'report.html')}", highlight=False, soft_wrap=True, markup=False)


def _leave_report(run: "Run") -> None:
    """What is known when a run ends early; where that cannot be written, why it ended is what matters."""
    from ..data.report.files import write_report

    try:
        report = run.report()
        if report.steps:
            write_report(report, run.out)
    except (OSError, ValueError):
        pass


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise fail(f'{error.name} is not installed: pip install "llama-fast[data]"') from None
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        errors.print("interrupted: what is complete is kept, and the same command goes on from there", highlight=False)
        raise typer.Exit(130) from None


def _share(text: str) -> float:
    """Of "1%" or 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise fail(f"--max-bad: {text!r} is no share; write 1% or 0.01")
    return share


@contextmanager
def _progress() -> Iterator["Show"]:
    """Bars on stderr in a terminal, else a line for what begins."""
    stderr = sys.stderr  # while tasks run, sys.stderr leads nowhere
    if not errors.is_terminal:
        told: set[str] = set()

        def tell(what: str, documents: int, of_documents: int | None, tasks: int, of_tasks: int) -> None:
            if what not in told:
                told.add(what)
                print(what, file=stderr, flush=True)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[documents]:>12,} documents"),
        TextColumn("{task.fields[tasks]}"), TimeElapsedColumn(),
    )  # fmt: skip
    terminal = Progress(*columns, console=Console(file=stderr))
    bars: dict[str, int] = {}

    def show(what: str, documents: int, of_documents: int | None, tasks: int, of_tasks: int) -> None:
        if what not in bars:
            bars[what] = terminal.add_task(what, documents=0, tasks="")
        done = tasks == of_tasks
        total = max(documents, of_documents or 0) or of_tasks
        terminal.update(
            terminal.task_ids[list(bars).index(what)], completed=total if done else documents,
            total=total if of_documents or done else None, documents=documents, tasks=f"{tasks}/{of_tasks} tasks",
        )  # fmt: skip

    with terminal:
        yield show


def _print(report: "Report") -> None:
    from ..reports.units import number, size

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in ("step", "in", "removed", "out", "text"):
        table.add_column(header, justify="left" if header == "step" else "right")
    for step in report.steps:
        removed = f"{step.documents_removed:,}" if step.removed else "–"
        table.add_row(
            escape(f"{step.stage}: {step.name}"), f"{step.documents_in:,}", removed, f"{step.documents_out:,}", size(step.bytes_out)
        )  # fmt: skip
    console.print(table)
    if report.fault_count:
        console.print(f"could not be read: {report.fault_count:,} lines or files", highlight=False)
    for shards in report.shards:
        each = f", {number(shards.bytes / shards.tokens)} bytes of text each" if shards.tokens else ""
        console.print(
            f"{shards.folder}: {shards.tokens:,} tokens in {shards.documents:,} documents{each}", highlight=False, soft_wrap=True, markup=False
        )  # fmt: skip
