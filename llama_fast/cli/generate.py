"""`llama-fast generate`: complete prompts, and show the text as it comes."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from . import engine_options as options
from .common import console, errors, fail, grouped, has_input


@grouped
def generate(
    model: options.Model = options.EMBEDDED,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What the text starts with; -, or none in a pipe, reads it from stdin."),
    ] = None,
    max_tokens: options.MaxTokens = 128,
    stop: options.Stop = None,
    *,
    sampling: options.Sampling,
    engine: options.Engine,
) -> None:
    """Complete prompts, and show the text as it comes. Figures go to stderr, text alone to stdout."""
    if not prompt and has_input():
        prompt = ["-"]
    try:
        prompts = [_read_stdin() if text == "-" else text for text in prompt or ()]
        if not any(prompts):
            raise fail('give at least one prompt: llama-fast generate -p "Once upon a time"')
        from ..engine.sampling import SamplingParams  # seconds: not before it is known that there is a prompt
        from .terminal import stream

        params = SamplingParams(max_tokens=max_tokens, stop=stop or (), **asdict(sampling))
        llm = engine.open_for_one(model, params)
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
    if sys.stdin is None:
        raise ValueError("stdin is closed: there is no prompt to read from it")
    return sys.stdin.read().removesuffix("\n")
