"""How good the model is while it learns: bits per byte of held-out shards, and how it goes on with a text."""

import math
from collections.abc import Iterator

import torch

from ..decoder.tokenizer import Tokenizer
from .batches import Documents, Piece, micro_batch
from .config import BatchConfig
from .model import Packed, TrainedDecoder
from .ranks import ALONE, Ranks


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
    def bits_per_byte(self, model: TrainedDecoder, ranks: Ranks = ALONE) -> float:
        batches, nats = list(self._batches()), {}
        for number in ranks.turns(len(batches)):
            batch = micro_batch(self.shards, batches[number or 0], self.device, ignored=self.shards.eos_id)
            loss = model(batch.packed, batch.labels).item()
            if number is not None:
                nats[number] = loss
        return math.fsum(ranks.gathered(nats, len(batches), batch.labels.device).tolist()) / math.log(2) / self.bytes

    def _batches(self) -> Iterator[list[Piece]]:
        """As many pieces at a time as a micro-batch of training has room for."""
        room = self.config.rows * self.config.sequence_length
        waiting: list[Piece] = []
        for piece in self._pieces():
            if waiting and sum(each.count for each in waiting) + piece.count > room:
                yield waiting
                waiting = []
            waiting.append(piece)
        yield waiting

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
