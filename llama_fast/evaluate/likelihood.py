"""Log-likelihoods of tokens, by the engine. Of a batch of sequences only a number for each token is kept."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ..engine.llm import LLM
from ..engine.sampling import SamplingParams

BATCH = 64
"""Sequences that the engine is given at a time: it computes so many tokens of them in a step as it has room for."""

_ASKED = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0, detokenize=False)


@dataclass(frozen=True)
class Likelihood:
    """Of the last tokens of a sequence: the log-probability of each in nats, and whether each is the likeliest there."""

    logprobs: list[float]
    is_greedy: bool


def likelihoods(llm: LLM, sequences: Iterable[tuple[Sequence[int], int]]) -> Iterator[Likelihood]:
    """Of each of some token sequences, that of its last `count` tokens, which leave out at least its first.

    Raises:
        ValueError: a sequence is longer than the context.
    """
    remaining = iter(sequences)
    while batch := list(islice(remaining, BATCH)):
        completions = llm.generate([list(ids) for ids, _ in batch], _ASKED)
        for (ids, count), completion in zip(batch, completions, strict=True):
            found = completion.prompt_logprobs
            assert found is not None and count < len(ids)
            last = found[len(found) - count :]
            yield Likelihood([entry.logprob for entry in last], all(entry.rank == 1 for entry in last))
