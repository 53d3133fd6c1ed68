"""The command line: one thin command for each job."""

import itertools
import json
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .cli_bench import app as bench_app
from .cli_common import console, errors, fail, write_whole
from .cli_profile import app as profile_app

if TYPE_CHECKING:
    from .demo import DemoResult
    from .engine import LLM
    from .sampling import SamplingParams


class Device(str, Enum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(str, Enum):
    """Dtypes of weights and arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


app = typer.Typer(
    help="Fused Triton kernels that make LLaMA-family decoders fast, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.add_typer(profile_app, name="profile")


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="A folder or a hub id; the embedded model by default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the text starts with.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate at most.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each side.")] = 5,
    device: Annotated[Device, typer.Option(help="auto: the first GPU, or the CPU.")] = Device.auto,
    dtype: Annotated[DType, typer.Option(help="Weights and arithmetic.")] = DType.float32,
) -> None:
    """Swap fused layers into a LLaMA and prove it: parity, throughput and latency before and after."""
    import torch

    from .environment import default_device

    try:
        from . import demo as job
        from .engine import EMBEDDED_MODEL
    except ImportError as error:
        raise fail(str(error)) from None
    where = default_device() if device == Device.auto else torch.device(device.value)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise fail("--device cuda: PyTorch sees no GPU here; use --device cpu")
    try:
        with errors.status("starting") as status:
            result = job.run_demo(
                model or EMBEDDED_MODEL, prompt=job.PROMPT if prompt is None else prompt, new_tokens=new_tokens,
                rounds=rounds, device=where, dtype=getattr(torch, dtype.value),
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

    same, total = result.identical_tokens, len(plain.token_ids)
    verdict = "[green]pass[/]" if result.logits_pass else "[red]FAIL[/]"
    table = Table("parity", "transformers", "fused", title="Parity with the float64 reference", title_justify="left")
    table.add_row("largest logit error", f"{plain.largest_logit_error:.2e}", f"{fused.largest_logit_error:.2e}")
    table.add_row("relative logit error", f"{plain.relative_logit_error:.2e}", f"{fused.relative_logit_error:.2e}")
    table.add_row("within 2x of transformers + eps", "", verdict)
    table.add_row("greedy tokens identical", "", f"{same} of {total}" if same < total else f"[green]all {total}[/]")
    console.print(table)

    title = f"Speed, medians of {result.rounds} interleaved rounds on {result.implementation}"
    table = Table(title=title, title_justify="left")
    table.add_column("speed", no_wrap=True)
    for column in ("transformers", "fused", "ratio"):
        table.add_column(column, justify="right")
    for label, before, after in (
        ("throughput, tokens/s", plain.tokens_per_second, fused.tokens_per_second),
        ("time to first token, ms", plain.first_token_ms, fused.first_token_ms),
        ("time per token, ms", plain.token_ms, fused.token_ms),
        ("peak memory, MiB", plain.peak_memory_mib, fused.peak_memory_mib),
    ):
        if before is not None and after is not None:
            table.add_row(label, f"{before:,.2f}", f"{after:,.2f}", f"{after / before:.2f}x")
    console.print(table)
    if not result.implementation.endswith(": Triton"):
        console.print(
            "No Triton kernel ran at speed here: these figures say nothing about the kernels.", style="yellow"
        )
    console.print(f"\n[bold]{escape(result.prompt)}[/]{escape(fused.text)}", highlight=False)
    if plain.text != fused.text:
        console.print(f"\n[dim]plain transformers wrote:[/] {escape(plain.text)}", highlight=False)


ModelArgument = Annotated[str | None, typer.Argument(help="A folder or a hub id; the embedded model by default.")]
MaxTokens = Annotated[int, typer.Option(min=0, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DTypeName = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
CacheTokens = Annotated[int | None, typer.Option(min=1, help="Size of the KV cache; by default what fits.")]


@app.command()
def generate(
    model: ModelArgument = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What the text starts with; - reads it from stdin.")
    ] = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given again.")] = None,
    device: DeviceName = "auto",
    dtype: DTypeName = "auto",
    max_cache_tokens: CacheTokens = None,
) -> None:
    """Complete prompts, and show the text as it comes. Figures go to stderr, text alone to stdout."""
    from .sampling import SamplingParams
    from .terminal import stream

    if not prompt:
        raise fail('give at least one prompt: llama-fast generate -p "Once upon a time"')
    try:
        prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            stop=stop or (),
        )  # fmt: skip
        llm = _open(model, device, dtype, max_cache_tokens, params)
        for text in prompts:
            request = llm.submit(text, params)
            console.print(f"[bold]{escape(text)}[/]", end="", highlight=False, soft_wrap=True)
            streamed = stream(llm, request, _write)
            console.print()
            errors.print(f"[dim]{streamed}[/]", highlight=False)
            if streamed.interrupted:
                raise typer.Exit(130)
    except BrokenPipeError:  # whoever read the text has enough: typer ends without a word
        raise
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


@app.command()
def chat(
    model: ModelArgument = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    device: DeviceName = "auto",
    dtype: DTypeName = "auto",
    max_cache_tokens: CacheTokens = None,
) -> None:
    """Talk with a model. /reset starts again, /quit or Ctrl-D ends; Ctrl-C ends a reply."""
    from .sampling import SamplingParams
    from .terminal import Conversation

    try:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        llm = _open(model, device, dtype, max_cache_tokens, params)
        llm.tokenizer.chat([{"role": "user", "content": ""}])  # a model without a template says so at once
        conversation = Conversation(llm, params, system)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    errors.print("[dim]/reset starts again, /quit ends, Ctrl-C ends a reply[/]", highlight=False)
    while (text := _ask()) not in (None, "/quit"):
        if text == "/reset":
            conversation.reset()
        elif text:
            try:
                streamed = conversation.say(text, _write)
            except ValueError as error:
                errors.print(f"[red]error:[/] {escape(str(error))}; /reset starts again", highlight=False)
                continue
            console.print()
            errors.print(f"[dim]{streamed}[/]", highlight=False)


def _open(
    model: str | None, device: str, dtype: str, max_cache_tokens: int | None, params: "SamplingParams"
) -> "LLM":  # fmt: skip
    """An engine for one sequence at a time. On a GPU it has captured its step: the lines that say so come before any text."""
    from .engine import LLM

    llm = LLM(model, device=device, dtype=dtype, max_cache_tokens=max_cache_tokens, max_batch=1)
    if llm.device.type == "cuda":
        llm.generate([0], replace(params, max_tokens=3, ignore_eos=True, stop=()))
    return llm


def _ask() -> str | None:
    """A line from the user; None at the end of input, or for Ctrl-C before anything was typed."""
    try:
        return console.input("[bold]> [/]" if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _write(text: str) -> None:
    """Text as it is: no markup, no wrapping, at once."""
    console.file.write(text)
    console.file.flush()


@app.command()
def env() -> None:
    """What is installed, which GPU is there, which implementation each op will use and why."""
    from . import environment

    table = Table("package", "version", title="Installed")
    for name, version in environment.versions().items():
        table.add_row(name, version if version != "not installed" else f"[dim]{version}[/]")
    console.print(table)

    gpus = environment.gpus()
    console.print("GPUs: " + ("; ".join(gpus) if gpus else "none that PyTorch can use"))

    device = environment.default_device()
    implementation = environment.implementation_on(device)
    table = Table("op", f"implementation for {device.type} tensors", title="Ops")
    for op in environment.op_names():
        table.add_row(op, implementation.name)
    console.print(table)
    console.print(f"Why: {implementation.reason}.")


@app.command()
def inspect(
    gpu: Annotated[
        str | None, typer.Option(help="Comma-separated: sm_80, sm_90, sm_100, gfx942. All by default.")
    ] = None,
    op: Annotated[str | None, typer.Option(help="Comma-separated op names. All by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Compile every plan for GPUs that need not be here, and show what the binaries use."""
    from .kernels.catalog import OPS, examples, inspect_example
    from .kernels.launch import GPUS, INTERPRETED

    if INTERPRETED:
        raise fail("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    chosen_gpus = [GPUS[name] for name in _choose("--gpu", gpu, list(GPUS))]
    work = [
        (example, g) for g in chosen_gpus for name in _choose("--op", op, list(OPS)) for example in examples(name, g)
    ]
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise fail(f"--json: the folder {json_file.absolute().parent} does not exist")

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
