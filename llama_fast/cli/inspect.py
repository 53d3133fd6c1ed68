"""`llama-fast inspect`: what the kernels' binaries use, compiled for GPUs and CPUs that need not be here."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..reports.jsonfile import write_whole
from .common import console, fail, require_writable


def inspect(
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: sm_80, sm_90, sm_100, gfx942 (these by default); cpu, which is this one, avx512, "
            "avx512_bf16, avx2, neon."
        ),
    ] = None,
    op: Annotated[str | None, typer.Option(help="Comma-separated op names. All by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Compile every plan for GPUs or CPUs that need not be here, and show what the binaries use."""
    from ..kernels.catalog import OPS, examples, inspect_example
    from ..kernels.launch import GPUS, INTERPRETED
    from ..kernels.native.machine import MACHINES, host, why_none
    from ..kernels.triton_compat import HAS_TRITON, TritonNotInstalledError

    if not HAS_TRITON:
        raise fail(str(TritonNotInstalledError()))
    if INTERPRETED:
        raise fail("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    targets = _choose("--gpu", gpu, list(GPUS), [*GPUS, "cpu", *MACHINES])
    ops = _choose("--op", op, list(OPS), list(OPS))
    known = GPUS | MACHINES
    if not set(targets) <= set(GPUS):
        here = host()
        if here is None:
            raise fail(f"--gpu: no code is made for CPUs here: {why_none()}")
        known["cpu"] = here
    found = {(target, name): list(examples(name, known[target])) for target in targets for name in ops}
    work = [(example, target) for (target, _), plans in found.items() for example in plans]
    if json_file is not None:
        require_writable("--json", json_file, folder=False)

    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=len(work))
        for example, target in work:
            progress.update(task, description=f"{target} {example.kernel} {example.shape}")
            rows.append(inspect_example(example, known[target]) | {"gpu": target})
            progress.advance(task)
    for (target, name), group in itertools.groupby(rows, key=lambda row: (row["gpu"], row["op"])):
        cells = _gpu_cells if target in GPUS else _cpu_cells
        console.print(_binary_table(f"{name} on {target}", list(group), cells))
    for target, name in (each for each, plans in found.items() if not plans):
        console.print(f"{name} has no kernel of its own on {target}: separate ops run there")
    if json_file is not None:
        write_whole(json_file, json.dumps(rows, indent=1))
        console.print(f"{len(rows)} rows written to {json_file}")


def _choose(option: str, given: str | None, default: list[str], known: list[str]) -> list[str]:
    names = default if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise fail(f"{option}: {name!r} is not known; choose from {', '.join(known)}")
    return names


def _binary_table(title: str, rows: list[dict[str, Any]], cells: Callable[[dict[str, Any]], dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    table.add_column("shape", overflow="fold")
    for column in cells(rows[0]):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        kernel = row["kernel"].removesuffix("_kernel").removeprefix(row["op"] + "_")
        table.add_row(kernel, row["shape"], *cells(row).values())
    return table


def _gpu_cells(row: dict[str, Any]) -> dict[str, str]:
    spilled = f"[red]{row['spill_bytes']}[/]" if row["spill_bytes"] > 16 else str(row["spill_bytes"])
    cores = f"{row['tensor_core_instructions']} {row['tensor_core']}" if row["tensor_core"] else "-"
    return {
        "regs": str(row["registers"]), "spill": spilled, "shared": str(row["shared_bytes"]), "MMA": cores,
        "access": str(row["access_bytes"]), "occup.": f"{row['occupancy']:.0%}",
    }  # fmt: skip


def _cpu_cells(row: dict[str, Any]) -> dict[str, str]:
    spilled = f"[red]{row['spills_in_loops']}[/]" if row["spills_in_loops"] else "0"
    products = f" {row['bf16_products']} bf16" if row["bf16_products"] else ""
    return {
        "vector": str(row["vector_bytes"]), "full": f"{row['full_width']:.0%}", "access": str(row["access_bytes"]),
        "FMA": f"{row['fma']}{products}", "spill": str(row["spills"]), "in loops": spilled,
        "code": str(row["code_bytes"]), "ms": f"{row['compile_ms']:.0f}",
    }  # fmt: skip
