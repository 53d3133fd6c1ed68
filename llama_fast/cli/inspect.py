"""`llama-fast inspect`: what the kernels' binaries use, compiled for GPUs that need not be here."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .common import console, fail, require_writable, write_whole


def inspect(
    gpu: Annotated[
        str | None, typer.Option(help="Comma-separated: sm_80, sm_90, sm_100, gfx942. All by default.")
    ] = None,
    op: Annotated[str | None, typer.Option(help="Comma-separated op names. All by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Compile every plan for GPUs that need not be here, and show what the binaries use."""
    from ..kernels.catalog import OPS, examples, inspect_example
    from ..kernels.launch import GPUS, INTERPRETED
    from ..kernels.triton_compat import HAS_TRITON, TritonNotInstalledError

    if not HAS_TRITON:
        raise fail(str(TritonNotInstalledError()))
    if INTERPRETED:
        raise fail("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    chosen_gpus = [GPUS[name] for name in _choose("--gpu", gpu, list(GPUS))]
    work = [
        (example, g) for g in chosen_gpus for name in _choose("--op", op, list(OPS)) for example in examples(name, g)
    ]
    if json_file is not None:
        require_writable("--json", json_file, folder=False)

    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=len(work))
        for example, g in work:
            progress.update(task, description=f"{g.arch} {example.kernel} {example.shape}")
            rows.append(inspect_example(example, g))
            progress.advance(task)
    for (arch, name), group in itertools.groupby(rows, key=lambda row: (row["gpu"], row["op"])):
        console.print(_binary_table(f"{name} on {arch}", list(group)))
    if json_file is not None:
        write_whole(json_file, json.dumps(rows, indent=1))
        console.print(f"{len(rows)} rows written to {json_file}")


def _choose(option: str, given: str | None, known: list[str]) -> list[str]:
    names = known if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise fail(f"{option}: {name!r} is not known; choose from {', '.join(known)}")
    return names


def _binary_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    table.add_column("shape", overflow="fold")
    for column in ("regs", "spill", "shared", "MMA", "access", "occup."):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        spilled = f"[red]{row['spill_bytes']}[/]" if row["spill_bytes"] > 16 else str(row["spill_bytes"])
        cores = f"{row['tensor_core_instructions']} {row['tensor_core']}" if row["tensor_core"] else "-"
        table.add_row(
            row["kernel"].removesuffix("_kernel").removeprefix(row["op"] + "_"), row["shape"], str(row["registers"]),
            spilled, str(row["shared_bytes"]), cores, str(row["access_bytes"]), f"{row['occupancy']:.0%}",
        )  # fmt: skip
    return table
