"""The operators of a side on a CPU, and the launches of steps that it replays: what each must do, counted once, and what it takes,
timed in further runs."""

from torch import Tensor, nn

from ..measure.phases import by_token
from ..measure.quiet import Patience
from ..measure.sides import EngineSide, Generation, Side, TransformersSide
from .counting import FORWARD, Op, OpCounter
from .kernels import Entry, operator_entries
from .replays import Replay, Replays

_COUNTED, _TIMED = 5, 13
_REPLAYED = 64  # the launches of the last of these are timed: those right after a prompt take 3 % longer


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
        self._side, self._prompts = side, prompts
        self._timed, self._replayed = min(new_tokens, _TIMED), min(new_tokens, _REPLAYED)
        counter = OpCounter(module_of(side))
        _, self._counted = count(side, prompts, min(new_tokens, _COUNTED), counter)
        self._replays = Replays(side)
        _, replayed = self._replays.generate(prompts, self._replayed)
        self.replays = any(replayed)
        self.prompt: list[list[Entry]] = []
        self.decoding: list[list[Entry]] = []
        self.waited: list[float | None] = []
        self._patience = Patience(repeats)

    def time(self) -> None:
        """Generates some tokens, and times each operator; again if other work disturbs it, `repeats` times in all."""

        def once() -> tuple[list[list[Op]], list[list[Replay]]]:
            counter = OpCounter(module_of(self._side), only_time=True)
            _, ops = count(self._side, self._prompts, self._timed, counter)
            # apart from these: what the counter does between two steps makes launches 3 % slower
            _, replays = self._replays.generate(self._prompts, self._replayed)
            return ops, [[], *replays[1:][1 - len(ops) :]] if replays else [[] for _ in ops]

        (ops, replays), waited = self._patience.undisturbed(once)
        self.waited.append(waited)
        for i, (timed, replayed) in enumerate(zip(ops, replays, strict=True)):
            if replayed:  # beside prompts of other rows, a token's step is one of operators: that is another step
                timed = [op for op in timed if op.phase != FORWARD]
            entries = operator_entries(self._counted[min(i, len(self._counted) - 1)], timed)
            if not i:
                self.prompt.append(entries)
            elif all(replay.launches for replay in replayed):
                launches = [entry for replay in replayed for entry in self._replays.entries(replay)]
                self.decoding.append([*launches, *entries])


def module_of(side: Side) -> nn.Module:
    """The modules that a side computes with."""
    if isinstance(side, EngineSide):
        return side.llm.decoder
    assert isinstance(side, TransformersSide)
    module: nn.Module = side.model
    return module


def count(side: Side, prompts: Tensor, new_tokens: int, counter: OpCounter) -> tuple[Generation, list[list[Op]]]:
    """Generates under the counter. The ops that ended before each token and after the one before it."""
    side.watch(counter.on_phase)
    try:
        with counter.listening():
            generation = side.generate(prompts, new_tokens)
    finally:
        side.watch(None)
    return generation, by_token(counter.ops, generation)
