"""`llama-fast generate`: complete prompts, and show the text as it comes."""

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
    from ..engine.sampling import SamplingParams
    from .terminal import stream

    if not prompt:
        raise fail('give at least one prompt: llama-fast generate -p "Once upon a time"')
    try:
        prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            stop=stop or (),
        )  # fmt: skip
        llm = open_engine(model, device, dtype, max_cache_tokens, params)
        for text in prompts:
            request = llm.submit(text, params)
            console.print(f"[bold]{escape(text)}[/]", end="", highlight=False, soft_wrap=True)
            streamed = stream(llm, request, write)
            console.print()
            errors.print(f"[dim]{streamed}[/]", highlight=False)
            if streamed.interrupted:
                raise typer.Exit(130)
    except BrokenPipeError:  # whoever read the text has enough: typer ends without a word
        raise
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
