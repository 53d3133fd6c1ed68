"""Requests: what users ask of the engine, and what it knows of each."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from .bad_words import Words
from .completion import Completion, FinishReason, Output
from .sampling import SamplingParams
from .scheduler import Sequence as TokenSequence

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """Text that a stream has settled. The last piece carries the whole `completion`."""

    text: str
    completion: Completion | None = None


@dataclass(eq=False)
class Run:
    """A sequence of a request, as the engine sees it."""

    output: Output
    params: SamplingParams
    seed: int
    bad_words: Words
    empty: bool  # no token may be generated: its one token is dropped
    # they start when its prompt is in the cache, and find it there
    followers: list[TokenSequence] = field(default_factory=list)
    done: bool = False  # what it produced is whole: the last thing that is said of it, for other threads to read

    def end(self, reason: FinishReason) -> None:
        self.output.end(reason)
        self.done = True


class Request:
    """A prompt on its way through the engine: `completion` grows, and `done` says when it is whole."""

    def __init__(self, runs: dict[TokenSequence, Run]) -> None:
        self.runs, self.sequences = runs, list(runs)
        self._outputs = [run.output for run in runs.values()]
        self.completion = self._outputs[0].completion
        self.completion.others = [output.completion for output in self._outputs[1:]]

    @property
    def done(self) -> bool:
        return all(run.done for run in self.runs.values())

    def new_text(self) -> str:
        """The text of the first output that was settled since this was last asked."""
        return self._outputs[0].new_text()


def as_prompts(prompts: Any) -> list[Prompt]:
    """Token ids, also in an array or a tensor, are one prompt, as a string is."""
    if isinstance(prompts, str | bytes):
        return [prompts]  # bytes are refused later
    each = list(prompts.tolist() if hasattr(prompts, "tolist") else prompts)
    return [each] if each and isinstance(each[0], Integral) else each


def token_ids_of(prompt: Prompt, encode: Callable[[str], list[int]], vocab_size: int) -> list[int]:
    """A prompt's token ids: those of a string, or those that are given. Raises ValueError for what is neither, and for none."""
    given: Any = encode(prompt) if isinstance(prompt, str) else prompt
    given = given.tolist() if hasattr(given, "tolist") else given
    # bytes would be read as integers
    is_ids = isinstance(given, Iterable) and not isinstance(given, bytes | bytearray | memoryview)
    ids: list[Any] = list(given) if is_ids else [None]
    if not all(isinstance(i, Integral) and 0 <= int(i) < vocab_size for i in ids):
        raise ValueError(f"a prompt must be a string or token ids from 0 to {vocab_size - 1}, got {prompt!r}")
    if not ids:
        raise ValueError("the prompt is empty, and this model begins no text by itself: give at least one token")
    return [int(i) for i in ids]
