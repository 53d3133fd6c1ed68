"""`llama-fast chat`: talk with a model."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from .common import console, errors, fail
from .engine_options import (
    CacheTokens,
    DeviceName,
    DTypeName,
    MaxTokens,
    MinP,
    ModelArgument,
    Seed,
    Temperature,
    TopK,
    TopP,
    open_engine,
    write,
)


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
    from ..engine.sampling import SamplingParams
    from .terminal import Conversation

    try:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        llm = open_engine(model, device, dtype, max_cache_tokens, params)
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
                streamed = conversation.say(text, write)
            except ValueError as error:
                errors.print(f"[red]error:[/] {escape(str(error))}; /reset starts again", highlight=False)
                continue
            console.print()
            errors.print(f"[dim]{streamed}[/]", highlight=False)


def _ask() -> str | None:
    """A line from the user; None at the end of input, or for Ctrl-C before anything was typed."""
    try:
        return console.input("[bold]> [/]" if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
