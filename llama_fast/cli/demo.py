"""`llama-fast demo`: swap fused layers into a LLaMA and prove it."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .common import Threads, console, errors, fail

if TYPE_CHECKING:
    from .demo_run import DemoResult


class Device(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    """Dtypes of weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def demo(
    model: Annotated[
        str | None, typer.Option(help="A folder, a .gguf file, a hub id or smollm2; the embedded model by default.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the text goes on from.")] = None,
    chat: Annotated[str | None, typer.Option(help="What a chat model is asked, instead of --prompt.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate at most.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each side.")] = 5,
    device: Annotated[Device, typer.Option(help="auto: the first GPU, or the CPU.")] = Device.auto,
    dtype: Annotated[DType, typer.Option(help="Weights and arithmetic.")] = DType.float32,
    threads: Threads = None,
) -> None:
    """Swap fused layers into a LLaMA and prove it: parity, throughput and latency before and after."""
    import torch

    from ..environment import default_device

    try:
        from ..engine import EMBEDDED_MODEL
        from . import demo_run as job
    except ImportError as error:
        raise fail(str(error)) from None
    if prompt is not None and chat is not None:
        raise fail("--prompt and --chat are two ways to begin: give one of them")
    opening = None if prompt is None else job.Opening(prompt)
    if chat is not None:
        opening = job.Opening(chat, is_chat=True)
    where = default_device() if device == Device.auto else torch.device(device.value)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise fail("--device cuda: PyTorch sees no GPU here; use --device cpu")
    try:
        with errors.status("starting") as status:
            result = job.run_demo(
                model or EMBEDDED_MODEL, opening=opening, new_tokens=new_tokens, rounds=rounds, device=where,
                dtype=getattr(torch, dtype.value),
                progress=lambda step: status.update(escape(step)),
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    _print_demo(result)


def _print_demo(result: "DemoResult") -> None:
    plain, fused = result.plain, result.fused
    name = "the embedded model" if Path(result.model).name == "demo_model" else result.model
    console.print(f"[bold]{escape(name)}[/], {result.dtype}, on [bold]{result.implementation}[/]")
    console.print(result.report.table())

    ours = {"fused": fused} if isinstance(result.engine, str) else {"fused": fused, "engine": result.engine}
    table = Table("parity", "transformers", *ours, title="Parity with the float64 reference", title_justify="left")
    for label, name in (
        ("largest logit error", "largest_logit_error"),
        ("relative logit error", "relative_logit_error"),
    ):
        table.add_row(label, *(f"{getattr(side, name):.2e}" for side in (plain, *ours.values())))
    verdicts = ["[green]pass[/]" if result.logits_pass(side) else "[red]FAIL[/]" for side in ours.values()]
    table.add_row("within 2x of transformers + eps", "", *verdicts)
    total = len(plain.token_ids)
    same = [result.identical_tokens(side) for side in ours.values()]
    counts = [f"{count} of {total}" if count < total else f"[green]all {total}[/]" for count in same]
    table.add_row("greedy tokens identical", "", *counts)
    console.print(table)

    title = f"Speed, medians of {result.rounds} interleaved rounds on {result.implementation}"
    table = Table(title=title, title_justify="left")
    table.add_column("speed", no_wrap=True)
    for column in ("transformers", *(column for name in ours for column in (name, "ratio"))):
        table.add_column(column, justify="right")
    for label, name in (
        ("throughput, tokens/s", "tokens_per_second"),
        ("time to first token, ms", "first_token_ms"),
        ("time per token, ms", "token_ms"),
        ("peak memory, MiB", "peak_memory_mib"),
    ):
        before = getattr(plain, name)
        if before is not None:
            cells = [_beside(before, getattr(side, name)) for side in ours.values()]
            table.add_row(label, f"{before:,.2f}", *(text for cell in cells for text in cell))
    console.print(table)
    if isinstance(result.engine, str):
        console.print(f"no llama_fast.LLM beside it: {escape(result.engine)}", style="yellow")
    if not result.implementation.endswith((": Triton", "native")):
        console.print(
            "No Triton kernel ran at speed here: these figures say nothing about the kernels.", style="yellow"
        )
    _print_texts(result)


def _beside(before: float, after: float | None) -> tuple[str, str]:
    """A figure of ours and its ratio to the one before."""
    return ("", "") if after is None else (f"{after:,.2f}", f"{after / before:.2f}x")


def _print_texts(result: "DemoResult") -> None:
    opening, plain, fused = result.opening, result.plain, result.fused
    # an answer stands below its question
    console.print(f"\n[bold]{escape(opening.text)}[/]" + "\n" * opening.is_chat + escape(fused.text), highlight=False)
    if plain.text != fused.text:
        console.print(f"\n[dim]plain transformers wrote:[/] {escape(plain.text)}", highlight=False)
    elif opening.is_chat:
        console.print("\n[dim]the fused model's answer; plain transformers gave the same[/]", highlight=False)
