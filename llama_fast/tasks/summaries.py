"""Summaries. A long text is summed up in parts, and then their summaries are, until they fit."""

from collections.abc import Sequence

from ..engine.completion import Completion
from ..engine.llm import LLM
from ..engine.sampling_params import SamplingParams
from .pieces import pieces, whole_sentences
from .prompts import TaskPrompt, checked_texts


def summarize(llm: LLM, texts: str | Sequence[str], *, max_tokens: int = 96, prompt: str | None = None) -> list[str]:
    """A summary of each text, in their order.

    Args:
        llm: the engine.
        texts: of any length: one that does not fit the context is cut into parts, and the summaries of these are summed up.
        max_tokens: of a summary. What it cuts off in a sentence is dropped.
        prompt: with {text}; by default that of the model's `task_prompts.json`, or else ours.

    Raises:
        ValueError: a text is empty; `prompt` has other fields; a text is long, and `max_tokens` more than a quarter of what the context has room for.
    """
    asked = TaskPrompt.of(llm, "summarize", prompt)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=asked.stop)

    def summaries(parts: list[str]) -> list[str]:
        return [_summary(done) for done in llm.generate([asked.tokens(text=part) for part in parts], params)]

    texts = checked_texts("texts", texts)
    room = asked.room(max_tokens)
    while True:
        cut = [pieces(llm.tokenizer, text, room) for text in texts]
        if all(len(parts) == 1 for parts in cut):
            return summaries(texts)
        if 4 * max_tokens > room:  # two pieces in a row fill one, so the summaries of all are half as long at most
            raise ValueError(
                f"max_tokens must be at most {room // 4} to sum up texts longer than the context, got {max_tokens}"
            )
        found = iter(summaries([part for parts in cut if len(parts) > 1 for part in parts]))
        texts = [parts[0] if len(parts) == 1 else "\n".join(next(found) for _ in parts) for parts in cut]


def _summary(done: Completion) -> str:
    text = done.text.strip()
    return whole_sentences(text) if done.finish_reason == "length" else text
