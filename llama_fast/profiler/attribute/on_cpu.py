"""The operators of a side on a CPU: what each must do, counted once, and what it takes, timed in further runs."""

from torch import Tensor, nn

from ..measure.quiet import Patience
from ..measure.sides import EngineSide, Generation, Side, TransformersSide
from .counting import Op, OpCounter
from .kernels import Entry, cpu_entries

_COUNTED, _TIMED = 5, 13


class Operators:
    """The operators of one side, step by step: counted when this is made, timed by each `time`.

    They are timed in turns with the rounds whose latency they explain, as what else a machine does moves both.

    Attributes:
        prompt: entries of the prompt's computation, once for each `time`.
        decoding: entries of each decoding step.
        waited: the share of the timed steps in which other work had the CPUs, once for each `time`; None: not known.
    """

    def __init__(self, side: Side, prompts: Tensor, new_tokens: int, *, repeats: int = 0) -> None:
        self._side, self._prompts, self._new_tokens = side, prompts, min(new_tokens, _TIMED)
        counter = OpCounter(module_of(side))
        _, self._counted = count(side, prompts, min(new_tokens, _COUNTED), counter)
        self.prompt: list[list[Entry]] = []
        self.decoding: list[list[Entry]] = []
        self.waited: list[float | None] = []
        self._patience = Patience(repeats)

    def time(self) -> None:
        """Generates some tokens, and times each operator; again if other work disturbs it, `repeats` times in all."""

        def once() -> list[list[Op]]:
            counter = OpCounter(module_of(self._side), only_time=True)
            return count(self._side, self._prompts, self._new_tokens, counter)[1]

        timed, waited = self._patience.undisturbed(once)
        self.waited.append(waited)
        counted = self._counted
        self.prompt.append(cpu_entries(counted[0], timed[0]))
        self.decoding += [cpu_entries(counted[min(i, len(counted) - 1)], timed[i]) for i in range(1, len(timed))]


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
    of_tokens: list[list[Op]] = [[] for _ in generation.times]
    i = 0
    for op in counter.ops:
        while i < len(of_tokens) and op.ended > generation.start + generation.times[i]:
            i += 1
        if i < len(of_tokens):
            of_tokens[i].append(op)
    return generation, of_tokens
