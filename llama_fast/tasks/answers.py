"""Answers from texts. A long text is read in windows, each of which answers; the answer that its window makes likeliest is taken."""

from collections.abc import Sequence

from ..engine.completion import Completion
from ..engine.llm import LLM
from ..engine.sampling_params import SamplingParams
from .pieces import pieces
from .prompts import TaskPrompt, checked_texts


def answer(
    llm: LLM, questions: str | Sequence[str], contexts: str | Sequence[str], *, max_tokens: int = 48,
    prompt: str | None = None,
) -> list[str]:  # fmt: skip
    """The answer to each question, in their order.

    Args:
        llm: the engine.
        questions: as many as there are contexts.
        contexts: for each question the text that it is about, of any length. One that does not fit is read in windows that overlap by a
            quarter, and of their answers that are not empty the one with the largest mean log-probability of a token is taken.
        max_tokens: of an answer.
        prompt: with {question} and {context}; by default that of the model's `task_prompts.json`, or else ours.

    Raises:
        ValueError: there are more questions than contexts, or fewer; one is empty; `prompt` has other fields; a question leaves no
            room for its text.
    """
    asked = TaskPrompt.of(llm, "answer", prompt)
    questions, contexts = checked_texts("questions", questions), checked_texts("contexts", contexts)
    if len(questions) != len(contexts):
        raise ValueError(f"each question needs a context, got {len(questions)} questions and {len(contexts)} contexts")
    windows: list[list[str]] = []
    for question, context in zip(questions, contexts, strict=True):
        room = asked.room(max_tokens, question=question)
        windows.append(pieces(llm.tokenizer, context, room, overlap=room // 4))
    prompts = [
        asked.tokens(question=question, context=window)
        for question, several in zip(questions, windows, strict=True) for window in several
    ]  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=asked.stop, logprobs=0)
    done = iter(llm.generate(prompts, params))
    return [max((next(done) for _ in several), key=_rank).text.strip() for several in windows]


def _rank(done: Completion) -> tuple[bool, float]:
    """Any words before none; then by the mean of all tokens, the end included: by their sum the shortest answer would win."""
    total = done.cumulative_logprob
    assert total is not None
    return bool(done.text.strip()), total / max(1, len(done.token_ids))
