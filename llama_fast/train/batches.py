"""What each step learns from: rows of tokens, packed from documents.

Text (shards) is laid end to end in the order that (seed, epoch) shuffles it into, and cut into rows of one length; what is left at the end and
fills no row is left out of this epoch. A document that does not end with its row goes on in the next one, and is a sequence of its own there.
Conversations are not cut: they are put together to rows once, the longest first, each where the least space is left (best fit), and an
epoch shuffles these rows.

So which tokens a row has is a function of (seed, its number) alone, the cursor of a run is the number of rows it has read, and how many
labels a row has is known without reading a token.

A label is the token that follows in the same document, also where it stands in the next row, if it is one that is learnt.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.conversations import Conversations
from ..data.shards import Shards
from ..decoder.tokenizer import Tokenizer
from .config import BatchConfig
from .dropout import make_key
from .model import Packed

Documents: TypeAlias = Shards | Conversations

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """Some rows side by side, the label of each of their tokens, (tokens,) int64, and what is random in the step is a function of."""

    packed: Packed
    labels: Tensor
    key: Tensor | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of a document that stands in one row: `document` from token `start`, and how many."""

    document: int
    start: int
    count: int


def open_documents(path: Path, tokenizer: Tokenizer, config: BatchConfig) -> Documents:
    """The conversations of a .jsonl file, or the shards of a folder. Raises ValueError as these do."""
    if path.suffix == ".jsonl":
        return Conversations(path, tokenizer, longest=config.sequence_length)
    return Shards(path, tokenizer)


class Batches:
    """The rows of shards, or of conversations.

    Attributes:
        rows_per_epoch: how many rows an epoch has.

    Raises:
        ValueError: the shards do not fill one row.
    """

    def __init__(
        self, documents: Documents, config: BatchConfig, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.documents, self.config, self.seed, self.device = documents, config, seed, device
        self._lengths = documents.lengths()
        whole = isinstance(documents, Conversations)
        self._rows = (WholeRows if whole else CutRows)(self._lengths, config.sequence_length, seed)
        self.rows_per_epoch = self._rows.per_epoch
        if not self.rows_per_epoch:
            raise ValueError(
                f"{documents.folder} has {documents.tokens:,} tokens, not one row of {config.sequence_length:,}: "
                "make batch.sequence_length smaller, or give more text"
            )

    def targets(self, cursor: int) -> int:
        """How many labels the step that begins with row `cursor` has, counted without reading a token."""
        count = self.documents.count_learnt
        return sum(count(piece.document, piece.start + 1, self._stop(piece)) for piece in self._step(cursor))

    def tokens(self, cursor: int) -> int:
        """How many tokens that step reads."""
        return sum(piece.count for piece in self._step(cursor))

    def step(self, cursor: int) -> Iterator[MicroBatch]:
        """The micro-batches of the step that begins with row `cursor`."""
        for number in range(self.config.micro_batches):
            yield self.micro_batch(cursor, number)

    def micro_batch(self, cursor: int, number: int) -> MicroBatch:
        """One of the step's micro-batches, counted from 0."""
        first = cursor + number * self.config.rows
        pieces = [piece for row in range(first, first + self.config.rows) for piece in self.pieces(row)]
        return replace(micro_batch(self.documents, pieces, self.device), key=make_key(self.seed, first))

    def pieces(self, row: int) -> list[Piece]:
        """What stands in a row, counted from the start of the run."""
        return self._rows.pieces(*divmod(row, self.rows_per_epoch))

    def _step(self, cursor: int) -> Iterator[Piece]:
        return (piece for row in range(cursor, cursor + self.config.rows_per_step) for piece in self.pieces(row))

    def _stop(self, piece: Piece) -> int:
        """Where the labels of a piece end in its document."""
        return min(piece.start + piece.count + 1, int(self._lengths[piece.document]))


class CutRows:
    """Documents of these lengths end to end, cut into rows."""

    def __init__(self, lengths: npt.NDArray[np.int64], row_length: int, seed: int) -> None:
        self._lengths, self._row_length, self._seed = lengths, row_length, seed
        self.per_epoch = int(lengths.sum()) // row_length
        self._epoch: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def pieces(self, epoch: int, row: int) -> list[Piece]:
        order, ends = self._of(epoch)
        first = row * self._row_length
        last = first + self._row_length
        found = []
        i = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            document, end = int(order[i]), int(ends[i])
            start = int(self._lengths[document]) - (end - first)
            count = min(end, last) - first
            if count:  # a document may be empty
                found.append(Piece(document, start, count))
            first, i = first + count, i + 1
        return found

    def _of(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The order of the documents, and where each ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = _shuffled(len(self._lengths), self._seed, epoch)
            self._epoch = epoch, order, np.cumsum(self._lengths[order])
        return self._epoch[1:]


class WholeRows:
    """Documents of these lengths, none longer than a row, put together to rows."""

    def __init__(self, lengths: npt.NDArray[np.int64], row_length: int, seed: int) -> None:
        self._seed = seed
        self._rows: list[list[Piece]] = []
        spaces: list[tuple[int, int]] = []  # what is left in a row, and which it is
        for document in np.argsort(-lengths, kind="stable").tolist():
            length = int(lengths[document])
            fits = bisect_left(spaces, (length, -1))
            if fits == len(spaces):
                self._rows.append([])
                space, row = row_length, len(self._rows) - 1
            else:
                space, row = spaces.pop(fits)
            self._rows[row].append(Piece(document, 0, length))
            insort(spaces, (space - length, row))
        self.per_epoch = len(self._rows)
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def pieces(self, epoch: int, row: int) -> list[Piece]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, _shuffled(self.per_epoch, self._seed, epoch)
        return self._rows[self._epoch[1][row]]


def _shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """An order of so many things. RandomState, because NumPy promises its numbers never change."""
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    return np.random.RandomState(bits).permutation(count).astype(np.int64)


def micro_batch(
    documents: Documents, pieces: Sequence[Piece], device: torch.device | str, *, ignored: int | None = None
) -> MicroBatch:
    """Pieces of documents side by side. `ignored` is a token that is no label."""
    counts = [piece.count for piece in pieces]
    ids = np.empty(sum(counts), np.int64)
    labels = np.full(sum(counts), IGNORED, np.int64)
    at = 0
    for piece in pieces:
        tokens = documents[piece.document][piece.start : piece.start + piece.count + 1].astype(np.int64)
        ids[at : at + piece.count] = tokens[: piece.count]
        is_learnt = documents.is_learnt(piece.document, piece.start + 1, piece.start + len(tokens))
        labels[at : at + len(tokens) - 1] = np.where(is_learnt, tokens[1:], IGNORED)
        at += piece.count
    if ignored is not None:
        labels[labels == ignored] = IGNORED
    return MicroBatch(Packed.of(torch.from_numpy(ids).to(device), counts), torch.from_numpy(labels).to(device))
