"""`llama-fast summarize`, `translate`, `answer` and `complete`: files of texts in, a text for each out."""

from typing import Annotated

import typer

from . import batch
from . import engine_options as options
from .batch import Batch
from .common import fail, grouped


@grouped
def summarize(
    model: options.Model,
    field: batch.Field = "text",
    prompt: batch.Prompt = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a summary at most.")] = 96,
    *,
    at: batch.Files,
    engine: options.Engine,
) -> None:
    """Sum up texts. One that is longer than the context is summed up in parts first.

    A prompt has {text}.
    """
    from .. import tasks

    Batch(at, fields=[field]).run(
        lambda llm, rows: tasks.summarize(llm, [row[field] for row in rows], max_tokens=max_tokens, prompt=prompt),
        model=model, engine=engine,
    )  # fmt: skip


@grouped
def translate(
    model: options.Model,
    target: Annotated[str, typer.Option(help="Language to translate to.", show_default=False)] = "",
    source: Annotated[str, typer.Option(help="Language to translate from.")] = "English",
    field: batch.Field = "text",
    prompt: batch.Prompt = None,
    *,
    at: batch.Files,
    engine: options.Engine,
) -> None:
    """Translate texts, paragraph by paragraph.

    A prompt has {text}, and may have {source} and {target}.
    """
    from .. import tasks

    if not target:
        raise fail("give the language to translate to: --target French")
    Batch(at, fields=[field]).run(
        lambda llm, rows: tasks.translate(
            llm, [row[field] for row in rows], source=source, target=target, prompt=prompt
        ),
        model=model, engine=engine,
    )  # fmt: skip


@grouped
def answer(
    model: options.Model,
    question: Annotated[
        str | None, typer.Option(help="About every text; by default rows have one each, in the field question.")
    ] = None,
    field: batch.Field = "context",
    prompt: batch.Prompt = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 48,
    *,
    at: batch.Files,
    engine: options.Engine,
) -> None:
    """Answer questions about texts. One that is longer than the context is read in windows, and the likeliest answer is taken.

    A prompt has {question} and {context}.
    """
    from .. import tasks

    if question is not None and not question.strip():
        raise fail("--question: it is empty")
    fields = [field] if question is not None else [field, "question"]
    Batch(at, fields=fields).run(
        lambda llm, rows: tasks.answer(
            llm,
            [row["question"] if question is None else question for row in rows],
            [row[field] for row in rows], max_tokens=max_tokens, prompt=prompt,
        ),
        model=model, engine=engine,
    )  # fmt: skip


@grouped
def complete(
    model: options.Model,
    field: batch.Field = "text",
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    *,
    at: batch.Files,
    engine: options.Engine,
) -> None:
    """Complete texts: `llama-fast generate` for files of them."""
    from .. import tasks
    from ..engine.sampling_params import SamplingParams

    try:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop or ())
    except ValueError as error:
        raise fail(str(error)) from None
    Batch(at, fields=[field]).run(
        lambda llm, rows: tasks.complete(llm, [row[field] for row in rows], params=params), model=model, engine=engine
    )
