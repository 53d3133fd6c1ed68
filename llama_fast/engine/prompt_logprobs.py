"""Log-probabilities of the tokens of a prompt, chunk by chunk as it is computed."""

import torch
from torch import Tensor

from ..decoder.model import Decoder
from .completion import Completion, TextOf, TokenLogprob
from .placement import LOGPROB_ROWS, upload
from .sampling import Logprobs, logprobs_of
from .scheduler import Chunk


def compute(decoder: Decoder, chunk: Chunk, hidden: Tensor, count: int) -> Logprobs:
    """Of the tokens of the prompt that follow those of a chunk, whose hidden states are given, with the `count` likeliest of each.

    The logits of some are there at a time.
    """
    targets = upload(_following(chunk), hidden.device)
    rows = hidden[: len(targets)]  # what follows the last token of the prompt is no prompt
    parts = [
        logprobs_of(decoder.logits(some), some_targets, count)
        for some, some_targets in zip(torch.split(rows, LOGPROB_ROWS), torch.split(targets, LOGPROB_ROWS), strict=True)
    ]
    whole = (torch.cat([getattr(part, name) for part in parts]) for name in ("chosen", "ranks", "top", "top_ids"))
    return Logprobs(*whole)


def append(completion: Completion, chunk: Chunk, logprobs: Logprobs, text_of: TextOf) -> None:
    """Adds those of a chunk, which are on the host, to the completion."""
    found = completion.prompt_logprobs
    assert found is not None
    for i, token_id in enumerate(_following(chunk)):
        if chunk.start + i == len(found):  # a prompt that lost its blocks is computed twice
            found.append(TokenLogprob.of(logprobs, i, token_id, logprobs.top.shape[1], text_of))


def _following(chunk: Chunk) -> list[int]:
    return chunk.sequence.prompt[chunk.start + 1 : chunk.end + 1]
