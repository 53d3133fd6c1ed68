"""Completions: texts as they are, without a template, go on."""

from collections.abc import Sequence

from ..engine.llm import LLM
from ..engine.sampling_params import SamplingParams
from .prompts import checked_texts

GREEDY = SamplingParams(temperature=0, max_tokens=128)


def complete(llm: LLM, texts: str | Sequence[str], *, params: SamplingParams = GREEDY) -> list[str]:
    """What follows each text, in their order, as it comes: no space is dropped.

    Args:
        llm: the engine.
        texts: they go without a template.
        params: by default greedy, 128 tokens at most.

    Raises:
        ValueError: a text is empty, or longer than the context.
    """
    return [done.text for done in llm.generate(checked_texts("texts", texts), params)]
