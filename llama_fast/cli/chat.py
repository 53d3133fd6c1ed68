"""`llama-fast chat`: talk with a model."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.markup import escape

from . import engine_options as options
from .common import Threads, console, errors, fail

_HELP = """/help   shows this
/reset  starts a new conversation
/exit   ends; so do Ctrl-D, and Ctrl-C twice
Ctrl-C ends a reply. The arrow keys edit a line and bring back earlier ones."""


def chat(
    model: options.ModelArgument = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    device: options.DeviceName = "auto",
    dtype: options.DTypeName = "auto",
    max_cache_tokens: options.CacheTokens = None,
    threads: Threads = None,
) -> None:
    """Talk with a model. /help says what else can be typed; Ctrl-C ends a reply, Ctrl-D the chat."""
    from ..engine.sampling import SamplingParams
    from .terminal import Conversation

    try:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        llm = options.open_engine(model, device, dtype, max_cache_tokens, params)
        llm.tokenizer.chat([{"role": "user", "content": ""}])  # a model without a template says so at once
        conversation = Conversation(llm, params, system)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    errors.print("[dim]/help says what else can be typed[/]", highlight=False)
    for text in _typed() if sys.stdin.isatty() else map(str.strip, sys.stdin):
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            errors.print(_HELP, highlight=False)
        elif text:
            try:
                streamed = conversation.say(text, options.write)
            except ValueError as error:
                errors.print(f"[red]error:[/] {escape(str(error))}; /reset starts again", highlight=False)
                continue
            console.print()
            errors.print(f"[dim]{streamed}[/]", highlight=False)


def _typed() -> Iterator[str]:
    """Lines as the user types them, until Ctrl-D, or Ctrl-C twice in a row."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    interrupted = False
    while True:
        try:
            text = session.prompt("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            errors.print("[dim]Ctrl-C again, Ctrl-D or /exit ends[/]", highlight=False)
            continue
        interrupted = False
        yield text
