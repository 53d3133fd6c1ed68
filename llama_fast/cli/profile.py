"""`llama-fast profile`: where each microsecond of a generated token goes, and what changed since another profile."""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from . import engine_options as options
from .common import (
    Command,
    GroupWithDefault,
    Threads,
    console,
    errors,
    fail,
    read_measured,
    require_writable,
)

if TYPE_CHECKING:
    from ..profiler.result import Profile

app = typer.Typer(
    cls=GroupWithDefault,
    help="Where each microsecond of a generated token goes, and how far it is from the machine's limit.",
    add_completion=False,
)


@app.command(cls=Command)
def run(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a .gguf file, a hub id or smollm2; the embedded model by default.")
    ] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="512 by default, or what the model has room for.", show_default=False)
    ] = None,
    new_tokens: Annotated[
        str | None, typer.Option(help="128 by default, or what the model has room for.", show_default=False)
    ] = None,
    batch: Annotated[str, typer.Option(help="Comma-separated: 1,8. Requests at once.")] = "1",
    context: Annotated[
        str | None, typer.Option(help="Comma-separated: 1k,8k,32k. Lengths at which a token's time is measured.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Comma-separated: transformers, transformers-fused, transformers-static.")
    ] = None,
    device: options.DeviceName = "auto",
    dtype: options.DTypeName = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each side.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for profile.json, profile.html and trace.json.")] = None,
    threads: Threads = None,
) -> None:
    """Measure latency, and show where each microsecond of a token goes and how far it is from the machine's limit.

    `llama-fast profile compare A B` says what changed from one profile to another; it has its own --help.
    """
    lengths = [
        None if given is None else _lengths(option, given)
        for option, given in (
            ("--prompt-tokens", prompt_tokens), ("--new-tokens", new_tokens), ("--batch", batch), ("--context", context),
        )
    ]  # fmt: skip
    for option, values in zip(("--prompt-tokens", "--new-tokens"), lengths, strict=False):
        if values is not None and len(values) != 1:
            raise fail(f"{option} takes one length, got {len(values)}")
    folder = _folder(out, model)
    prompt, new, batches, contexts = lengths
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's tracer writes between the lines of progress
    try:
        from ..profiler.run import profile

        with tempfile.TemporaryDirectory() as temporary, _progress() as progress:
            trace = Path(temporary) / "trace.json"
            measured = profile(
                model, prompt_tokens=prompt[0] if prompt else None, new_tokens=new[0] if new else None,
                batch=batches or (1,), contexts=contexts, against=_names(against), dtype=dtype, device=device,
                rounds=rounds, trace=trace, progress=progress,
            )  # fmt: skip
            progress("writing")
            written = _write(measured, folder, trace)
    except KeyboardInterrupt:
        errors.print("interrupted", highlight=False)
        raise typer.Exit(130) from None
    except (ImportError, OSError, ValueError) as error:
        raise fail(str(error)) from None
    from ..profiler.report.terminal import show

    show(measured, console)
    console.print(f"{', '.join(written)} written to {escape(str(folder))}", highlight=False, soft_wrap=True)


@app.command(cls=Command)
def compare(
    before: Annotated[Path, typer.Argument(help="A profile.json, or the folder it is in.")],
    after: Annotated[Path, typer.Argument(help="The same, later.")],
    minimum: Annotated[
        float | None, typer.Option(min=0.0, help="Smallest change that counts: 0.03 by default, 0.1 on a CPU.")
    ] = None,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Compare profiles of two machines.")
    ] = False,
) -> None:
    """Say what changed beyond the noise, kernel by kernel. Exit status 1: TTFT or ITL got slower, or parity was lost."""
    from ..profiler import compare as job
    from ..profiler.report.terminal import show_comparison
    from ..profiler.result import Profile

    files = (path / "profile.json" if path.is_dir() else path for path in (before, after))
    old, new = (read_measured(file, Profile, "`llama-fast profile`") for file in files)
    try:
        found = job.compare(old, new, minimum=minimum, across_machines=across_machines)
    except ValueError as error:
        raise fail(str(error)) from None
    show_comparison(found, console)
    raise typer.Exit(1 if found.is_regression else 0)


def _lengths(option: str, given: str) -> list[int]:
    """Of "1k,8k": k is 1024."""
    lengths = []
    for text in given.split(","):
        match = re.fullmatch(r"([1-9]\d*)(k?)", text.strip().lower())
        if match is None:
            raise fail(f"{option}: {text.strip()!r} is no number; write 512 or 8k, and commas between several")
        lengths.append(int(match[1]) * (1024 if match[2] else 1))
    return lengths


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def _folder(out: Path | None, model: str | None) -> Path:
    """Where the files go, by default a new folder here. That it can be written to is found out before anything is measured."""
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", Path(model or "embedded").name)
        out = Path(f"profile-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    require_writable("--out", out)
    return out


def _write(profile: "Profile", folder: Path, trace: Path) -> list[str]:
    """Each file whole or not at all. All are made before the first is written."""
    from ..profiler.report.page import page
    from ..reports.jsonfile import unfinished, write_json, write_whole

    html = page(profile)
    folder.mkdir(exist_ok=True)
    write_json(folder / "profile.json", profile)
    write_whole(folder / "profile.html", html)
    if not trace.exists():
        return ["profile.json", "profile.html"]
    with unfinished(folder / "trace.json") as partial:
        shutil.move(trace, partial)
    return ["profile.json", "profile.html", "trace.json"]


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is being done: in place in a terminal, else a line each."""
    if not errors.is_terminal:
        yield lambda step: print(step, file=sys.stderr, flush=True)
        return
    with errors.status("starting") as status:
        yield lambda step: status.update(escape(step))
