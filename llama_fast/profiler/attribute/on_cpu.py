"""The operators of a side on a CPU, and the launches of steps that it replays: what each must do, counted once, and what it takes,
timed in further runs."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from ..measure.quiet import Patience
from ..measure.sides import EngineSide, Generation, OnPhase, Side, TransformersSide
from .counting import Op, OpCounter
from .kernels import Entry, operator_entries
from .replays import Replay, Replays

_COUNTED, _TIMED = 5, 13


class _Ended(Protocol):
    @property
    def ended(self) -> float: ...


T = TypeVar("T", bound=_Ended)


class Operators:
    """The operators of one side, step by step: counted when this is made, timed by each `time`.

    They are timed in turns with the rounds whose latency they explain, as what else a machine does moves both.

    Attributes:
        prompt: entries of the prompt's computation, once for each `time`.
        decoding: entries of each decoding step: of a replayed one the launches, and the operators around them.
        replays: whether the side replays its decoding steps.
        waited: the share of the timed steps in which other work had the CPUs, once for each `time`; None: not known.
    """

    def __init__(self, side: Side, prompts: Tensor, new_tokens: int, *, repeats: int = 0) -> None:
        self._side, self._prompts, self._new_tokens = side, prompts, min(new_tokens, _TIMED)
        counter, self._replays = OpCounter(module_of(side)), Replays(side)
        with self._replays.timed() as replays:
            _, self._counted = count(side, prompts, min(new_tokens, _COUNTED), counter, self._replays.on_phase)
        self.replays = bool(replays)
        self.prompt: list[list[Entry]] = []
        self.decoding: list[list[Entry]] = []
        self.waited: list[float | None] = []
        self._patience = Patience(repeats)

    def time(self) -> None:
        """Generates some tokens, and times each operator; again if other work disturbs it, `repeats` times in all."""

        def once() -> tuple[list[list[Op]], list[list[Replay]]]:
            counter = OpCounter(module_of(self._side), only_time=True)
            with self._replays.timed() as replays:
                generation, ops = count(
                    self._side, self._prompts, self._new_tokens, counter, self._replays.on_phase
                )  # fmt: skip
            return ops, by_token(replays, generation)

        (ops, replays), waited = self._patience.undisturbed(once)
        self.waited.append(waited)
        entries = [
            operator_entries(self._counted[min(i, len(self._counted) - 1)], each) for i, each in enumerate(ops)
        ]  # fmt: skip
        self.prompt.append(entries[0])
        for of_operators, replayed in zip(entries[1:], replays[1:], strict=True):
            if all(replay.launches for replay in replayed):
                of_launches = [entry for replay in replayed for entry in self._replays.entries(replay)]
                self.decoding.append([*of_launches, *of_operators])


def module_of(side: Side) -> nn.Module:
    """The modules that a side computes with."""
    if isinstance(side, EngineSide):
        return side.llm.decoder
    assert isinstance(side, TransformersSide)
    module: nn.Module = side.model
    return module


def count(
    side: Side, prompts: Tensor, new_tokens: int, counter: OpCounter, on_phase: OnPhase = lambda _: None
) -> tuple[Generation, list[list[Op]]]:  # fmt: skip
    """Generates under the counter. The ops that ended before each token and after the one before it."""

    def watch(name: str) -> None:
        on_phase(name)
        counter.on_phase(name)

    side.watch(watch)
    try:
        with counter.listening():
            generation = side.generate(prompts, new_tokens)
    finally:
        side.watch(None)
    return generation, by_token(counter.ops, generation)


def by_token(ended: Sequence[T], generation: Generation) -> list[list[T]]:
    """What ended before each token and after the one before it. `ended` are in order."""
    of_tokens: list[list[T]] = [[] for _ in generation.times]
    i = 0
    for each in ended:
        while i < len(of_tokens) and each.ended > generation.start + generation.times[i]:
            i += 1
        if i < len(of_tokens):
            of_tokens[i].append(each)
    return of_tokens
