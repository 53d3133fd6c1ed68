"""What the commands that work on files of texts share: where rows come from and go to, progress, and what an interrupt leaves."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import engine_options as options
from .common import console, errors, fail, has_input, require_writable

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..tasks.rows import Finished, Row

Field = Annotated[str, typer.Option("--field", help="The field of a row that holds the text.")]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", help="What the model is asked, with fields in braces; by default its own or ours."),
]


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where rows come from and go to, as options of a command; "-" or no name is stdin."""

    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="Texts, or .jsonl files with a row a line; - or none reads stdin.", show_default=False
        ),
    ] = None
    out: Annotated[Path | None, typer.Option(help="File to write, as JSONL if it is called so; stdout by default.")] = (
        None
    )
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Stdin is JSONL, and stdout too.")] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out FILE.jsonl: rows that are in it are not computed again.")
    ] = False

    @property
    def writes_jsonl(self) -> bool:
        return self.jsonl if self.out is None else self.out.suffix == ".jsonl"

    def reads_jsonl(self, name: str) -> bool:
        return self.jsonl if name == "-" else Path(name).suffix == ".jsonl"


class Batch:
    """Rows of files, to be computed and written.

    Args:
        at: the files.
        fields: that a row must have; a text file is the only one.
    """

    def __init__(self, at: Files, *, fields: Sequence[str]) -> None:
        self.at, self.fields = at, fields
        self.written = self.skipped = 0

    def run(
        self, compute: "Callable[[LLM, list[Mapping[str, str]]], list[str]]", *, model: str, engine: options.Engine
    ) -> None:
        """Opens the engine, and writes the output of every row as it comes. Whatever is wrong with files is said before that."""
        from ..tasks.rows import as_line, compute_rows

        start = time.perf_counter()
        finished = self._finished()
        try:
            with ExitStack() as stack:
                rows = self._rows(stack)
                rows = finished.skip(rows, self._skip) if finished else rows
                llm = engine.open(model)
                compute(llm, [])  # says what is wrong with an option, and is no row's fault
                write, show = stack.enter_context(_writer(self.at.out)), stack.enter_context(_progress())
                for batch in compute_rows(rows, partial(compute, llm), self._skip):
                    for row, output in batch:
                        write(as_line(row, output) if self.at.writes_jsonl else output + "\n")
                        self.written += 1
                    show(self.written)
        except KeyboardInterrupt:
            errors.print(f"interrupted after {_rows(self.written)}{self._goes_on}", highlight=False)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # whoever read the text has enough: typer ends without a word
            raise
        except (OSError, ValueError) as error:
            raise fail(f"{error}{self._goes_on if self.written else ''}") from None
        there = f", {finished.count} were there" if finished else ""
        left_out = f", {self.skipped} skipped" if self.skipped else ""
        errors.print(
            f"[dim]{_rows(self.written)} in {time.perf_counter() - start:.1f} s{there}{left_out}[/]", highlight=False
        )
        if self.skipped:
            raise typer.Exit(1)

    @property
    def _goes_on(self) -> str:
        return "; --resume goes on" if self.at.out is not None and self.at.writes_jsonl else ""

    def _finished(self) -> "Finished | None":
        """What is in the file to go on with. Raises the exit for the user if nothing can or should be written there."""
        from ..tasks.rows import Finished

        out = self.at.out
        if self.at.resume and (out is None or not self.at.writes_jsonl):
            raise fail("--resume needs --out FILE.jsonl: in a text nothing says where a row ends")
        if out is None:
            return None
        require_writable("--out", out, folder=False)
        if any(out.exists() and Path(name).exists() and out.samefile(name) for name in self.at.files or ()):
            raise fail(f"--out: {out} is what is read: give another name")
        if out.exists() and not self.at.resume:
            goes_on = "go on with it by --resume, " if self.at.writes_jsonl else ""
            raise fail(f"--out: {out} is there: {goes_on}remove it, or give another name")
        try:
            return Finished(out) if self.at.resume else None
        except (OSError, ValueError) as error:
            raise fail(str(error)) from None

    def _rows(self, stack: ExitStack) -> "Iterator[Row]":
        """The rows of all files, each of which is opened here: one that is missing is found now, not after an hour."""
        from ..tasks.rows import read_rows

        opened = [(name, stack.enter_context(_opened(name))) for name in self.at.files or ["-"]]
        return (
            row for name, file in opened
            for row in read_rows(file, "stdin" if name == "-" else name, self.fields, self._skip, is_jsonl=self.at.reads_jsonl(name))
        )  # fmt: skip

    def _skip(self, problem: str) -> None:
        self.skipped += 1
        errors.print(f"[yellow]skipped:[/] {escape(problem)}", highlight=False, soft_wrap=True)


def _opened(name: str) -> IO[bytes]:
    if name != "-":
        try:
            return Path(name).open("rb")
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from None
    if not has_input():
        raise ValueError("give at least one file, or a text in a pipe")
    return sys.stdin.buffer


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes text at once: what an interrupt leaves are whole rows."""
    file: IO[str] = console.file if out is None else out.open("a", encoding="utf-8")

    def write(text: str) -> None:
        try:
            file.write(text)
            file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(f"{out or 'stdout'} cannot be written: {error.strerror}") from None

    try:
        yield write
    finally:
        if out is not None:
            with suppress(OSError):  # of what was not written, which has been said
                file.close()


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A function that shows on stderr how many rows are written, in a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(_rows(0))
        yield lambda count: bar.update(task, description=_rows(count))


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
