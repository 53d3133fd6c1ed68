"""Rounds of generation, the sides in turns, and what they took."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..result import Distribution, Latency
from .phases import Phases, phases_of_tokens
from .quiet import Patience
from .sides import Generation, Side

OnFailure = Callable[[Side, RuntimeError], None]

_WARM_UPS = 4
_STABLE = 0.1  # warm: a round takes as long as the one before it, but for so much


@dataclass
class Rounds:
    """What one side did in all rounds.

    Attributes:
        cold_ttft: time to first token of its first request.
        generations: the timed rounds; `phases` of each, token by token.
        waited: the share of each round's time in which threads were ready and other work had the CPUs; None: not known.
    """

    side: Side
    cold_ttft: float = 0.0
    generations: list[Generation] = field(default_factory=list)
    phases: list[list[dict[str, float]]] = field(default_factory=list)
    waited: list[float | None] = field(default_factory=list)

    def latency(self, batch: int) -> Latency:
        times = [generation.times for generation in self.generations]
        return Latency(
            ttft=Distribution(tuple(each[0] for each in times)),
            itl=Distribution(tuple(self.gaps)),
            tpot=Distribution(tuple((each[-1] - each[0]) / (len(each) - 1) for each in times)),
            e2el=Distribution(tuple(each[-1] for each in times)),
            cold_ttft=self.cold_ttft,
            batch=batch,
        )

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next, round by round."""
        return [b - a for generation in self.generations for a, b in pairwise(generation.times)]

    @property
    def decoding(self) -> list[tuple[float, dict[str, float]]]:
        """Of each token but the first: its time, and the phases that fill it."""
        return list(zip(self.gaps, (each for phases in self.phases for each in phases[1:]), strict=True))

    @property
    def first(self) -> list[tuple[float, dict[str, float]]]:
        """The same of the first tokens."""
        return [(g.times[0], phases[0]) for g, phases in zip(self.generations, self.phases, strict=True)]


def run_rounds(
    sides: Sequence[Side], prompts: Tensor, texts: Sequence[str] | None, new_tokens: int, rounds: int,
    *, tick: Callable[[str], None] = lambda _: None, after_round: Callable[[Rounds], None] = lambda _: None,
    on_failure: OnFailure,
) -> list[Rounds]:  # fmt: skip
    """Times `rounds` of each side in turns, after a warm-up of its own. `after_round` is called between them, untimed.

    What other work disturbs is repeated, as often in all as there are rounds; the try that was disturbed least counts.
    A side's first request here is its cold one: compilers, captures and caches of the process that others have filled stay filled.
    A side that fails in its warm-up is left out, if `on_failure` returns.
    """
    all_rounds = []
    for side in sides:
        tick(f"{side.name}: warm-up")
        rounds_of = Rounds(side)
        try:
            _warm_up(rounds_of, prompts, texts, new_tokens)
        except RuntimeError as error:
            on_failure(side, error)
        else:
            all_rounds.append(rounds_of)
    patience = Patience(rounds * len(all_rounds))
    for i in range(rounds):
        shift = i % len(all_rounds)  # nobody is always first
        in_turn = all_rounds[shift:] + all_rounds[:shift]
        for each in in_turn:
            tick(f"{each.side.name}: round {i + 1} of {rounds}")
            once = functools.partial(watched, each.side, prompts, new_tokens, texts)
            (generation, phases), waited = patience.undisturbed(once)
            each.generations.append(generation)
            each.phases.append(phases)
            each.waited.append(waited)
        for each in in_turn:  # each after another, as in its round: caches are as cold
            after_round(each)
    return all_rounds


def _warm_up(rounds: Rounds, prompts: Tensor, texts: Sequence[str] | None, new_tokens: int) -> None:
    before = rounds.side.generate(prompts, new_tokens, texts=texts).times
    rounds.cold_ttft = before[0]
    for _ in range(_WARM_UPS):
        now = rounds.side.generate(prompts, new_tokens, texts=texts).times
        if abs(now[-1] - before[-1]) < _STABLE * before[-1]:
            break
        before = now


def watched(
    side: Side, prompts: Tensor, new_tokens: int, texts: Sequence[str] | None = None, *, reuse: bool = False
) -> tuple[Generation, list[dict[str, float]]]:
    """One round, and the phases of each of its tokens."""
    phases = Phases()
    if torch.cuda.is_available() and prompts.is_cuda:
        torch.cuda.synchronize(prompts.device)
    side.watch(phases)
    try:
        generation = side.generate(prompts, new_tokens, texts=texts, reuse=reuse)
    finally:
        side.watch(None)
    return generation, phases_of_tokens(phases.marks, generation)
