"""`llama-fast eval`: how good a model is, with intervals, and what changed since another evaluation."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import engine_options as options
from .common import Command, GroupWithDefault, console, errors, fail, grouped, read_measured, require_writable

if TYPE_CHECKING:
    from ..evaluate.perplexity import Windows
    from ..evaluate.result import Evaluation, TaskResult
    from ..evaluate.tasks import Task

STORY_TASKS = ("stories", "questions", "summaries")

app = typer.Typer(
    cls=GroupWithDefault, help="How good a model is: perplexity, scores of texts, tasks.", add_completion=False
)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What a model is asked, as options of a command."""

    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            help="stories, questions, summaries; a text, .jsonl or .toml file; a folder of shards.", show_default=False
        ),
    ] = None
    lm_eval: Annotated[
        str | None, typer.Option(help="Comma-separated: tasks of lm-eval, or .yaml files that describe some.")
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of a task at most.")] = None
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False
    window: Annotated[int | None, typer.Option(help="Tokens that a text is read in at a time.")] = None
    stride: Annotated[int | None, typer.Option(help="Tokens that a window scores; half of it by default.")] = None
    training_text: Annotated[
        Path | None, typer.Option(help="A text like the training data, for xz to know before a text task.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals, and of the examples that a task draws.")] = 0

    def read(self) -> list["Task"]:
        """The tasks, ours before lm-eval's. Raises ValueError if there is none."""
        from ..evaluate.files import read_text
        from ..evaluate.perplexity import Windows
        from ..evaluate.tasks import PromptTask

        windows = Windows(window=self.window, stride=self.stride)
        training = None if self.training_text is None else read_text(self.training_text)
        asked = [self._task(name, windows, training) for name in self.tasks or ()]
        if self.chat:
            asked = [replace(task, chat=True) if isinstance(task, PromptTask) else task for task in asked]
        if self.lm_eval is not None:
            from ..evaluate.harness import load_tasks

            names = [name.strip() for name in self.lm_eval.split(",") if name.strip()]
            asked += load_tasks(names, limit=self.limit, chat=self.chat, seed=self.seed)
        if not asked:
            raise ValueError(
                "give at least one task, such as questions or a text file: llama-fast eval embedded questions"
            )
        return asked

    def _task(self, name: str, windows: "Windows", training: str | None) -> "Task":
        from ..evaluate import story_tasks
        from ..evaluate.files import read_task

        count = story_tasks.LIMIT if self.limit is None else self.limit
        if name == "stories":
            return story_tasks.story_texts(limit=count, seed=self.seed, windows=windows)
        if name == "questions":
            return story_tasks.story_questions(limit=count, seed=self.seed)
        if name == "summaries":
            return story_tasks.story_summaries(limit=count, seed=self.seed)
        if Path(name).exists():
            return read_task(Path(name), limit=self.limit, windows=windows, training=training)
        raise ValueError(
            f"there is no task {name!r}: it must be {', '.join(STORY_TASKS)}, a file, or a folder of shards"
        )


@app.command(cls=Command)
@grouped
def run(
    model: options.Model,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and evaluation.html.")] = None,
    *,
    exam: Exam,
    engine: options.Engine,
) -> None:
    """Measure how good a model is, and show its worst examples.

    `llama-fast eval compare A B` says what changed from one evaluation to another, `llama-fast eval score FILE.jsonl` scores outputs
    that are there; each has its own --help.
    """
    folder = _folder(out, model)
    done: list[TaskResult] = []

    def keep(evaluation: "Evaluation") -> None:
        _write(evaluation, folder)
        done[:] = evaluation.tasks

    try:
        from ..decoder import checkpoint
        from ..evaluate.run import evaluate

        asked = exam.read()
        with options.model_folder(model) as folder_of_model, _progress() as progress:
            path = checkpoint.find(folder_of_model)
            evaluation = evaluate(
                engine.open(path), asked, model=model, path=path, seed=exam.seed,
                command=shlex.join(["llama-fast", *sys.argv[1:]]), progress=progress, keep=keep,
            )  # fmt: skip
    except KeyboardInterrupt:
        errors.print("interrupted" + _what_is_kept(done, folder), highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except (ImportError, OSError, ValueError) as error:
        raise fail(str(error) + _what_is_kept(done, folder)) from None
    from ..evaluate.report.terminal import show

    show(evaluation, console)
    console.print(f"evaluation.json, evaluation.html written to {escape(str(folder))}", highlight=False, soft_wrap=True)


@app.command(cls=Command)
def compare(
    before: Annotated[Path, typer.Argument(help="An evaluation.json, or the folder it is in.")],
    after: Annotated[Path, typer.Argument(help="The same, of another model or later.")],
) -> None:
    """Say what changed on the same examples. Exit status 1: a task's first score got worse beyond the noise."""
    from ..evaluate import compare as job
    from ..evaluate.report.terminal import show_comparison
    from ..evaluate.result import Evaluation

    files = (path / "evaluation.json" if path.is_dir() else path for path in (before, after))
    old, new = (read_measured(file, Evaluation, "`llama-fast eval`") for file in files)
    try:
        found = job.compare(old, new)
    except ValueError as error:
        raise fail(str(error)) from None
    show_comparison(found, console)
    raise typer.Exit(1 if found.is_worse else 0)


@app.command(cls=Command)
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A row a line.", show_default=False)],
    reference: Annotated[str, typer.Option(help="The field with what is right: a text, or a list of them.")],
    output: Annotated[str, typer.Option(help="The field with what a model wrote.")] = "output",
    scores: Annotated[str, typer.Option(help="Comma-separated: rouge, chrf, bleu, exact_match, f1.")] = "rouge,chrf",
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals.")] = 0,
) -> None:
    """Score outputs that are there, such as those of `llama-fast summarize ROWS.jsonl --out FILE.jsonl`."""
    from ..evaluate.files import read_outputs
    from ..evaluate.report.terminal import show_scores
    from ..evaluate.run import score_outputs

    names = [name.strip() for name in scores.split(",") if name.strip()]
    try:
        outputs, references = read_outputs(file, output=output, reference=reference)
        show_scores([score_outputs(file.stem, outputs, references, names, seed=seed)], console)
    except (ImportError, OSError, ValueError) as error:
        raise fail(str(error)) from None


def _folder(out: Path | None, model: str) -> Path:
    """Where the files go, by default a new folder here. That it can be written to is found out before anything is computed."""
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", Path(model).name)
        out = Path(f"eval-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    require_writable("--out", out)
    return out


def _what_is_kept(done: list["TaskResult"], folder: Path) -> str:
    return f"; {folder} has {', '.join(task.name for task in done)}" if done else ""


def _write(evaluation: "Evaluation", folder: Path) -> None:
    """Each file whole or not at all. Both are made before the first is written."""
    from ..evaluate.report.page import page
    from ..reports.jsonfile import write_json, write_whole

    html = page(evaluation)
    folder.mkdir(exist_ok=True)
    write_json(folder / "evaluation.json", evaluation)
    write_whole(folder / "evaluation.html", html)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows on stderr how far a task is: a bar in a terminal, else nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        known: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in known:
                known[name] = bars.add_task(escape(name), total=total)
            bars.update(known[name], completed=done, total=total)

        yield show
