"""`llama-fast generate`: complete prompts, and show the text as it comes."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from . import engine_options as options
from .common import Threads, console, errors, fail


def generate(
    model: options.ModelArgument = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What the text starts with; -, or none in a pipe, reads it from stdin."),
    ] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given again.")] = None,
    device: options.DeviceName = "auto",
    dtype: options.DTypeName = "auto",
    max_cache_tokens: options.CacheTokens = None,
    threads: Threads = None,
) -> None:
    """Complete prompts, and show the text as it comes. Figures go to stderr, text alone to stdout."""
    from ..engine.sampling import SamplingParams
    from .terminal import stream

    if not prompt and not sys.stdin.isatty():
        prompt = ["-"]
    try:
        prompts = [_read_stdin() if text == "-" else text for text in prompt or ()]
        if not any(prompts):
            raise fail('give at least one prompt: llama-fast generate -p "Once upon a time"')
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            stop=stop or (),
        )  # fmt: skip
        llm = options.open_engine(model, device, dtype, max_cache_tokens, params)
        for text in prompts:
            request = llm.submit(text, params)
            console.print(f"[bold]{escape(text)}[/]", end="", highlight=False, soft_wrap=True)
            streamed = stream(llm, request, options.write)
            console.print()
            errors.print(f"[dim]{streamed}[/]", highlight=False)
            if streamed.interrupted:
                raise typer.Exit(130)
    except BrokenPipeError:  # whoever read the text has enough: typer ends without a word
        raise
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None


def _read_stdin() -> str:
    """All of it, without the newline that `echo` and editors end a text with: a model would take it for a paragraph's end."""
    return sys.stdin.read().removesuffix("\n")
