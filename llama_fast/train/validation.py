"""How good the model is while it learns: bits per byte of held-out shards, and how it goes on with a text."""

import math
from collections.abc import Iterator

import torch

from ..decoder.tokenizer import Tokenizer
from .batches import Documents, MicroBatch, Piece, micro_batch
from .config import BatchConfig
from .model import Packed, TrainedDecoder


class Validation:
    """Documents to predict: the first of `shards`, whole ones, with at most `tokens` together, but one at least.

    A document longer than a row is read in pieces, and each piece from its own first token on: less context than
    `llama-fast eval` gives it, so a little more bits. As there, the end token costs nothing. Of conversations the assistant's words count.
    """

    def __init__(
        self, shards: Documents, tokenizer: Tokenizer, config: BatchConfig, *, tokens: int, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.shards, self.config, self.device = shards, config, device
        lengths = shards.lengths()
        self._lengths = lengths[: max(1, int((lengths.cumsum() <= tokens).sum()))]
        self.bytes = sum(len(tokenizer.decode(shards.judged(i).tolist()).encode()) for i in range(len(self._lengths)))
        if not self.bytes:
            raise ValueError(
                f"{shards.folder} has no text in its first {len(self._lengths)} documents to validate with"
            )

    @torch.no_grad()
    def bits_per_byte(self, model: TrainedDecoder) -> float:
        nats = math.fsum(model(batch.packed, batch.labels).item() for batch in self._batches())
        return nats / math.log(2) / self.bytes

    def _batches(self) -> Iterator[MicroBatch]:
        """As many pieces at a time as a micro-batch of training has room for."""
        room = self.config.rows * self.config.sequence_length
        waiting: list[Piece] = []
        for piece in self._pieces():
            if waiting and sum(each.count for each in waiting) + piece.count > room:
                yield micro_batch(self.shards, waiting, self.device, ignored=self.shards.eos_id)
                waiting = []
            waiting.append(piece)
        yield micro_batch(self.shards, waiting, self.device, ignored=self.shards.eos_id)

    def _pieces(self) -> Iterator[Piece]:
        for document, length in enumerate(self._lengths.tolist()):
            for start in range(0, length, self.config.sequence_length):
                yield Piece(document, start, min(self.config.sequence_length, length - start))


@torch.no_grad()
def continued(model: TrainedDecoder, tokenizer: Tokenizer, text: str, *, tokens: int) -> str:
    """The text and what the model finds likeliest after it, up to an end token or so many tokens. All is computed again for each."""
    ids = tokenizer.encode(text)
    device = model.model.norm.weight.device
    for _ in range(tokens):
        row = torch.tensor(ids, device=device)
        ids.append(int(model.logits(Packed.of(row, [len(ids)]))[-1].argmax()))
        if ids[-1] in tokenizer.eos_ids:
            break
    return tokenizer.decode(ids)
