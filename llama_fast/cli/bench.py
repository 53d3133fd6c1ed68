"""`llama-fast bench`: measure, compare two measurements, or do all that an hour on a rented GPU should."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .common import Command, GroupWithDefault, Threads, console, errors, fail, read_measured, require_writable

if TYPE_CHECKING:
    import torch

    from ..benchmarks.models import StoredModel
    from ..benchmarks.suite.record import Record


class Kind(StrEnum):
    """What to measure."""

    all = "all"
    kernels = "kernels"
    layer = "layer"
    prefill = "prefill"
    generate = "generate"
    train = "train"


app = typer.Typer(
    cls=GroupWithDefault,
    help="Measure every kernel, layer and whole model against PyTorch and the best alternatives.",
    add_completion=False,
)

DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


@app.command(cls=Command)
def run(
    kind: Annotated[Kind, typer.Argument(help="What to measure.", show_default=True)] = Kind.all,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, little time: whether all works.")] = False,
    ops: Annotated[str | None, typer.Option(help="Comma-separated: rms_norm,attention. All by default.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of generate: a folder, a .gguf file, a hub id or smollm2, instead of random weights."),
    ] = None,
    device: DeviceName = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all samples to this file.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with plots to this folder, as HTML and as Markdown.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Measure kernels, layers and whole models against PyTorch and the best alternatives.

    `llama-fast bench compare A.json B.json` compares two such measurements, `llama-fast bench campaign --out DIR` does all
    that an hour on a GPU should; each has its own --help.
    """
    _require_extra("pytest", "pytest_benchmark", *(["matplotlib"] if report else []))
    if json_file is not None:
        require_writable("--json", json_file, folder=False)
    if report is not None:
        require_writable("--report", report)

    from ..benchmarks.peers import OURS
    from ..benchmarks.report.tables import print_record
    from ..benchmarks.suite import run as job
    from ..benchmarks.suite.comparison import QUICK_SECONDS, SECONDS

    where = _device(device)
    stored = _stored_model(model, kind)
    kinds = job.KINDS if kind == Kind.all else (kind.value,)
    chosen = None if ops is None else [name.strip() for name in ops.split(",")]
    try:
        cases = job.find_cases(kinds, chosen, where, quick=quick, model=stored)
    except ValueError as error:
        raise fail(f"--ops: {error}") from None
    ended, record = "", None
    try:
        with _progress() as show:
            show("the machine's limits", 0, len(cases))
            record = job.new_record(where, {"kinds": list(kinds), "ops": chosen, "model": model}, quick=quick)
            job.run_cases(record, cases, where, seconds=QUICK_SECONDS if quick else SECONDS, progress=show)
    except KeyboardInterrupt:
        ended = "interrupted"
    except job.GpuFailure as error:
        ended = str(error)
    if record is None:
        errors.print("interrupted before anything was measured")
        raise typer.Exit(130)
    if ended:
        record.warnings.append(f"ended early: {ended}")
    print_record(record, console)
    _keep(record, json_file, report)
    if ended:
        errors.print(
            f"[red]ended early:[/] {escape(ended)}" + _what_is_kept(json_file), highlight=False, soft_wrap=True
        )
        raise typer.Exit(130 if ended == "interrupted" else 1)
    if failures := sum(
        result.failure is not None and result.implementation.startswith(OURS) for result in record.results
    ):
        errors.print(f"[red]results of llama-fast that failed: {failures}[/], the rows that say FAIL", highlight=False)
        raise typer.Exit(1)


def _stored_model(name: str | None, kind: Kind) -> "StoredModel | None":
    """The model to measure. That it can be read is found out before the machine is measured."""
    if name is None:
        return None
    if kind != Kind.generate:
        raise fail(f"--model: `llama-fast bench generate --model {name}` measures a model; others take no weights")
    from ..benchmarks.models import StoredModel

    try:
        return StoredModel.named(name)
    except (ImportError, OSError, ValueError) as error:
        raise fail(f"--model: {error}") from None


def _what_is_kept(json_file: Path | None) -> str:
    return "; what was measured until then is above" + ("" if json_file is None else f" and in {json_file}")


def _keep(record: "Record", json_file: Path | None, report: Path | None) -> None:
    from ..reports.jsonfile import write_json

    try:
        if json_file is not None:
            write_json(json_file, record)
            console.print(f"{len(record.results)} results written to {escape(str(json_file))}", highlight=False)
        if report is not None:
            from ..benchmarks.report.publish import write_report_of_one_run

            markdown, html = write_report_of_one_run(record, report)
            console.print(
                f"report written to {escape(str(html))} and {escape(str(markdown))}", highlight=False, soft_wrap=True
            )
    except OSError as error:
        raise fail(str(error)) from None


@app.command(cls=Command)
def compare(
    before: Annotated[Path, typer.Argument(help="What `bench --json` wrote.")],
    after: Annotated[Path, typer.Argument(help="The same, later.")],
    minimum: Annotated[
        float | None, typer.Option(min=0.0, help="Smallest change that counts: 0.03 by default, 0.1 on a CPU.")
    ] = None,
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Judge by the clock alone, not beside the others of the same run.")
    ] = False,
    across_machines: Annotated[bool, typer.Option("--across-machines", help="Compare files of two machines.")] = False,
) -> None:
    """Say what got faster or slower beyond the noise. Exit status 1: something of llama-fast is slower, or newly fails."""
    from ..benchmarks.report.tables import print_comparison
    from ..benchmarks.suite import compare as job
    from ..benchmarks.suite.record import Record

    old, new = (read_measured(path, Record, "`llama-fast bench --json`") for path in (before, after))
    try:
        found = job.compare(old, new, minimum=minimum, absolute=absolute, across_machines=across_machines)
    except ValueError as error:
        raise fail(str(error)) from None
    print_comparison(found, console)
    raise typer.Exit(1 if found.is_regression else 0)


@app.command(cls=Command)
def campaign(
    out: Annotated[Path, typer.Option(help="A folder for the results; what is there is not done again.")],
    minutes: Annotated[float, typer.Option(min=0.05, help="This call ends within so many.")] = 9.0,
    part: Annotated[str | None, typer.Option(help="Only this part, or parts, comma-separated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, little time: whether all works.")] = False,
    device: DeviceName = "auto",
    in_process: Annotated[bool, typer.Option("--in-process", hidden=True)] = False,
) -> None:
    """Do all that an hour on a rented GPU should, in calls that each end in time: limits, the tests, every benchmark, a sweep
    of plans, profiles. The same command again goes on where the last one stopped. All results are also in `campaign.zip`.
    """
    _require_extra("pytest", "pytest_benchmark", "transformers")
    require_writable("--out", out)
    from ..benchmarks.report.headlines import headlines
    from ..benchmarks.suite import campaign as job

    where = _device(device)
    known = {each.name: each for each in job.parts()}
    names = list(known) if part is None else [name.strip() for name in part.split(",")]
    for name in names:
        if name not in known:
            raise fail(f"--part: there is no {name!r}; choose from {', '.join(known)}")
    out.mkdir(exist_ok=True)
    if in_process:
        raise typer.Exit(_run_part(names[0], out, where, minutes, quick))
    try:
        job.require_same(out, where, quick=quick)
    except ValueError as error:
        raise fail(f"--out: {error}; give another folder") from None
    chosen, interrupted = [known[name] for name in names], False
    try:
        job.run_campaign(out, chosen, device=device, minutes=minutes, quick=quick, tell=_tell)
    except KeyboardInterrupt:
        interrupted = True
        job.pack(out)
        errors.print("[red]interrupted[/]: the same command goes on from here")
    table = Table("part", "state", "figures", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    rows = headlines(out, chosen)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    left = [name for name, state, _ in rows if state != "done"]
    if left:
        console.print("left for the same command: " + escape(", ".join(left)), highlight=False)
    console.print(f"all of it is in {escape(str(out / job.PACKED))}", highlight=False, soft_wrap=True)
    if interrupted:
        raise typer.Exit(130)


def _run_part(name: str, out: Path, device: "torch.device", minutes: float, quick: bool) -> int:
    """0: complete, 3: out of time, 1: the GPU failed."""
    import time

    from ..benchmarks.suite import campaign as job
    from ..benchmarks.suite.run import GpuFailure

    deadline = time.monotonic() + 60 * minutes
    try:
        complete = job.run_part(name, out, device, quick=quick, deadline=deadline, progress=_progress_line)
    except GpuFailure as error:
        errors.print(escape(str(error)), highlight=False, soft_wrap=True)
        return 1
    return 0 if complete else 3


def _tell(line: str) -> None:
    errors.print(escape(line), highlight=False, soft_wrap=True)


def _device(name: str) -> "torch.device":
    import torch

    from ..environment import default_device

    try:
        device = default_device() if name == "auto" else torch.device(name)
    except RuntimeError:
        raise fail(f"--device {name}: choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise fail(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise fail(f"--device {name}: PyTorch sees {torch.cuda.device_count() or 'no'} GPU here; use --device cpu")
    return device


def _require_extra(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = ", ".join(package.replace("_", "-") for package in missing)
        raise fail(f'bench needs {names}, which is not installed: pip install "llama-fast[bench]"')


def _progress_line(what: str, done: int, total: int) -> None:
    if what:
        print(f"[{done + 1}/{total}] {what}", file=sys.stderr, flush=True)


@contextmanager
def _progress() -> "Iterator[Callable[[str, int, int], None]]":
    """A bar on stderr, and a function (what, done, total) that moves it. Where stderr is no terminal it is a line for each."""
    if not errors.is_terminal:
        yield _progress_line
        return
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what), completed=done, total=total)

        yield show
