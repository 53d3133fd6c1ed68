"""`llama-fast chat`: talk with a model."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from . import engine_options as options
from .common import console, errors, fail, grouped

_HELP = """/help   shows this
/reset  starts a new conversation
/exit   ends; so do Ctrl-D, and Ctrl-C twice
Ctrl-C ends a reply. The arrow keys edit a line and bring back earlier ones."""


@grouped
def chat(
    model: options.Model = options.EMBEDDED,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    max_tokens: options.MaxTokens = 512,
    *,
    sampling: options.Sampling,
    engine: options.Engine,
) -> None:
    """Talk with a model. /help says what else can be typed; Ctrl-C ends a reply, Ctrl-D the chat."""
    from ..engine.sampling import SamplingParams
    from .terminal import Conversation

    if sys.stdin is None:
        raise fail("stdin is closed: a chat reads from it what you say")
    try:
        params = SamplingParams(max_tokens=max_tokens, **asdict(sampling))
        llm = engine.open_for_one(model, params)
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
