"""How well a model predicts a text: bits per byte, nats a token, perplexity.

A document is read in windows that overlap. Each begins with BOS (`Tokenizer.start_id`); the first scores all its tokens, each other
one the `stride` tokens that are new in it, after at least `window - 1 - stride` tokens before them. So each token is scored once.

Bits per byte is what compares models of different tokenizers: the text's bytes are the same for all. For the same reason examples are
passages of PASSAGE characters, not windows, and a token counts where it ends.
"""

import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from ..engine.llm import LLM
from .likelihood import BATCH, likelihoods
from .result import Baseline

PASSAGE = 1000
LARGEST_WINDOW = 2048
"""By default: more context than this gains little, and costs time."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Passage:
    """A piece of a document, and what its tokens cost."""

    text: str
    nats: float
    tokens: int

    @property
    def statistics(self) -> list[float]:
        return [self.nats, float(self.tokens), float(len(self.text.encode()))]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How documents are cut.

    Args:
        window: tokens of a window, BOS too; None: LARGEST_WINDOW, or what the model's context holds.
        stride: tokens that a window after the first scores; None: half of the window.
    """

    window: int | None = None
    stride: int | None = None

    def of(self, llm: LLM) -> tuple[int, int]:
        """Window and stride for a model. Raises ValueError if they do not fit each other or its context."""
        window = min(LARGEST_WINDOW, llm.max_context) if self.window is None else self.window
        if not 2 <= window <= llm.max_context:
            raise ValueError(f"window must be from 2 to {llm.max_context} tokens (the context), got {window}")
        stride = max(1, window // 2) if self.stride is None else self.stride
        if not 1 <= stride <= window - 1:
            raise ValueError(f"stride must be from 1 to {window - 1} tokens (the window without BOS), got {stride}")
        return window, stride


DEFAULT_WINDOWS = Windows()


def score_documents(
    llm: LLM, documents: Sequence[str], windows: Windows = DEFAULT_WINDOWS, *, progress: Progress = lambda *_: None
) -> list[list[Passage]]:
    """The passages of each document, with the nats of their tokens.

    Args:
        llm: of which only the prompt's log-probabilities are asked.
        documents: texts, each read from its own BOS on.
        windows: how they are cut.
        progress: is told how many of how many characters are scored.

    Raises:
        ValueError: a document is empty; the windows do not fit; the tokenizer names neither a BOS nor an end token.
    """
    window, stride = windows.of(llm)
    start = llm.tokenizer.start_id
    if start is None:
        raise ValueError(
            "the model's tokenizer names neither a BOS nor an end token, and the first token of a text needs one before it: "
            "name it in tokenizer_config.json"
        )
    if not documents or not all(documents):
        raise ValueError("a text to score must not be empty")
    done, total = 0, sum(map(len, documents))
    scored: list[list[Passage]] = []
    for first in range(0, len(documents), BATCH):  # the tokens of so many are there at a time
        texts = documents[first : first + BATCH]
        read = [llm.tokenizer.encode_with_ends(text) for text in texts]
        pieces = (piece for ids, _ in read for piece in cut(ids, start=start, window=window, stride=stride))
        logprobs = chain.from_iterable(found.logprobs for found in likelihoods(llm, pieces))
        for text, (_, ends) in zip(texts, read, strict=True):
            scored.append(_passages(text, ends, logprobs, partial(_after, progress, done, total)))
            done += len(text)
    return scored


def _after(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _passages(
    text: str, ends: Sequence[int], logprobs: Iterator[float], progress: Callable[[int], None]
) -> list[Passage]:
    """A document's passages; its tokens' log-probabilities are the next ones. A rest below half a passage belongs to the one before."""
    starts = range(0, max(1, len(text) - PASSAGE // 2 + 1), PASSAGE)
    nats: list[list[float]] = [[] for _ in starts]
    for end, logprob in zip(ends, logprobs, strict=False):
        nats[min(max(0, end - 1) // PASSAGE, len(starts) - 1)].append(-logprob)
        progress(end)
    pieces = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [Passage(piece, math.fsum(each), len(each)) for piece, each in zip(pieces, nats, strict=True)]


def cut(ids: Sequence[int], *, start: int, window: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows over the tokens of a document, each with how many of its last tokens it scores."""
    room, end = window - 1, 0
    while end < len(ids):
        scored = end
        end = min(len(ids), end + stride if end else room)
        yield [start, *ids[max(0, end - room) : end]], end - scored


def xz_baselines(documents: Sequence[str], training: str | None = None) -> list[Baseline]:
    """Bits per byte of `xz -9`, of the documents one after the other; with a training text, of which it remembers 64 MiB, also after that.

    A model that is not better than this has learnt nothing that a packer does not see.
    """
    text = "".join(documents).encode()
    baselines = [Baseline("xz -9", "bits per byte", _packed_bits(text) / len(text))]
    if training is not None:
        context = training.encode()
        extra = _packed_bits(context + text) - _packed_bits(context)
        baselines.append(Baseline("xz -9 after the training text", "bits per byte", extra / len(text)))
    return baselines


def _packed_bits(text: bytes) -> int:
    return 8 * len(lzma.compress(text, preset=9))
