"""What each step learns from: rows of fixed length, packed from shards of tokens.

The documents of an epoch are shuffled by (seed, epoch), laid end to end, and cut into rows; what is left at the end and fills no row is
left out of this epoch. A document that does not end with its row goes on in the next one, and is a sequence of its own there. So which tokens
a row has is a function of (seed, its number) alone, the cursor of a run is the number of rows it has read, and how many labels a row has
is known without reading a token.

A label is the token that follows in the same document, also where it stands in the next row; the last token of a document has none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.shards import Shards
from .config import BatchConfig
from .model import Packed

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """Some rows side by side, and the label of each of their tokens, (tokens,) int64."""

    packed: Packed
    labels: Tensor


@dataclass(frozen=True)
class Piece:
    """A stretch of a document that stands in one row: `document` from token `start`, and how many."""

    document: int
    start: int
    count: int


class Batches:
    """The rows of a folder of shards.

    Attributes:
        rows_per_epoch: how many rows an epoch has.

    Raises:
        ValueError: the shards do not fill one row.
    """

    def __init__(self, shards: Shards, config: BatchConfig, *, seed: int, device: torch.device | str = "cpu") -> None:
        self.shards, self.config, self.seed, self.device = shards, config, seed, device
        self._lengths = shards.lengths()
        self.rows_per_epoch = shards.tokens // config.sequence_length
        if not self.rows_per_epoch:
            raise ValueError(
                f"{shards.folder} has {shards.tokens:,} tokens, not one row of {config.sequence_length:,}: "
                "make batch.sequence_length smaller, or give more text"
            )
        self._epoch: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def targets(self, cursor: int) -> int:
        """How many labels the step that begins with row `cursor` has, counted without reading a token."""
        pieces = (piece for row in range(cursor, cursor + self.config.rows_per_step) for piece in self.pieces(row))
        return sum(piece.count - int(self._ends_in(piece)) for piece in pieces)

    def step(self, cursor: int) -> Iterator[MicroBatch]:
        """The micro-batches of the step that begins with row `cursor`."""
        for number in range(self.config.micro_batches):
            yield self.micro_batch(cursor, number)

    def micro_batch(self, cursor: int, number: int) -> MicroBatch:
        """One of the step's micro-batches, counted from 0."""
        first = cursor + number * self.config.rows
        pieces = [piece for row in range(first, first + self.config.rows) for piece in self.pieces(row)]
        return micro_batch(self.shards, pieces, self.device)

    def pieces(self, row: int) -> list[Piece]:
        """What stands in a row, counted from the start of the run."""
        epoch, row = divmod(row, self.rows_per_epoch)
        order, ends = self._of(epoch)
        first = row * self.config.sequence_length
        last = first + self.config.sequence_length
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

    def _ends_in(self, piece: Piece) -> bool:
        return piece.start + piece.count == int(self._lengths[piece.document])

    def _of(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The order of the documents, and where each ends. RandomState, because NumPy promises its numbers never change."""
        if self._epoch is None or self._epoch[0] != epoch:
            bits = np.random.MT19937(np.random.SeedSequence((self.seed, epoch)))
            order = np.random.RandomState(bits).permutation(len(self._lengths)).astype(np.int64)
            self._epoch = epoch, order, np.cumsum(self._lengths[order])
        return self._epoch[1:]


def micro_batch(
    shards: Shards, pieces: Sequence[Piece], device: torch.device | str, *, ignored: int | None = None
) -> MicroBatch:
    """Pieces of documents side by side. `ignored` is a token that is no label."""
    counts = [piece.count for piece in pieces]
    ids = np.empty(sum(counts), np.int64)
    labels = np.full(sum(counts), IGNORED, np.int64)
    at = 0
    for piece in pieces:
        tokens = shards[piece.document][piece.start : piece.start + piece.count + 1]
        ids[at : at + piece.count] = tokens[: piece.count]
        labels[at : at + len(tokens) - 1] = tokens[1:]
        at += piece.count
    if ignored is not None:
        labels[labels == ignored] = IGNORED
    return MicroBatch(Packed.of(torch.from_numpy(ids).to(device), counts), torch.from_numpy(labels).to(device))
