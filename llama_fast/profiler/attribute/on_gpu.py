"""The kernels of a side on a GPU: traced as they run, and told which op they belong to by the same step run op by op."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine.placement import current
from ...engine.recorded_steps import Recorded
from ...engine.sampling import Needs
from ..measure.phases import by_token
from ..measure.sides import EngineSide, Side, TransformersSide
from .counting import Op, OpCounter
from .kernels import Entry, Event, kernel_entries
from .on_cpu import count, module_of
from .trace import Trace, traced

_TOKENS = 16  # that are traced; the first and last steps are left out


@dataclass(frozen=True)
class GpuSteps:
    """The entries of the prompt and of decoding steps, and what lies between them.

    Attributes:
        until_first: seconds from the request to the first kernel, as traced.
        copies: seconds of copies between two replays.
        span: of a replay, by events and without a tracer; 0 where none is replayed.
        between: from the last kernel of a step to the first of the next, without the copies, as traced; infinite where it is not known.
    """

    prompt: list[list[Entry]]
    decoding: list[list[Entry]]
    until_first: float
    copies: float = 0.0
    span: float = 0.0
    between: float = math.inf


def steps_on_gpu(side: Side, prompts: Tensor, new_tokens: int) -> GpuSteps:
    """Traces the prompt and some decoding steps after it, all after the rounds that were timed: everything is compiled and warm."""
    device = prompts.device
    with current(device):
        if isinstance(side, TransformersSide) and side.is_compiled:
            return _compiled(side, prompts, new_tokens)
        prompt, until_first = _prompt(side, prompts)
        tokens = min(new_tokens, _TOKENS)
        generation, trace = traced(lambda: side.generate(prompts, tokens), device)
        if isinstance(side, EngineSide) and trace.graphs:
            return _replayed(side, prompts, tokens, trace, prompt, until_first)
        of_tokens = by_token(trace.everything, generation)
        known, ops = _generation_by_ops(side, prompts, tokens)
        decoding = [kernel_entries(of_tokens[i], known[i], ops) for i in _middle(tokens)]
        return GpuSteps([prompt], decoding, until_first, between=_between([of_tokens[i] for i in _middle(tokens)]))


def _middle(tokens: int) -> range:
    """The decoding steps of so many tokens, without the last if there are others."""
    return range(1, max(2, tokens - 1))


def _replayed(
    side: EngineSide, prompts: Tensor, tokens: int, trace: Trace, prompt: list[Entry], until_first: float
) -> GpuSteps:
    replays = trace.graphs[1:-1] or trace.graphs
    captured, needs = _widest(side, prompts, tokens)
    known, ops = _step_by_ops(side, captured, needs, prompts.device)
    decoding = [kernel_entries(replay, known, ops) for replay in replays]
    span = _span(captured)
    side.llm.forget_prefixes()  # a step was computed again where its sequence is no more
    copies = _copies(trace, replays)
    return GpuSteps([prompt], decoding, until_first, copies, span, max(0.0, _between(replays) - copies))


def _widest(side: EngineSide, prompts: Tensor, tokens: int) -> tuple[Recorded[Any], Needs]:
    """The graph of most rows: where prompts take several steps, those that came first also end first, and the last steps are smaller."""
    steps = side.llm._core.runner.steps
    assert steps is not None
    steps.last, seen = None, []
    side.watch(lambda _: seen.append(steps.last))
    try:
        side.generate(prompts, tokens)
    finally:
        side.watch(None)
    return max((each for each in seen if each is not None), key=lambda each: len(each[0].inputs.cache_lens))


def _compiled(side: Side, prompts: Tensor, new_tokens: int) -> GpuSteps:
    """Of as many tokens as in the rounds: with others it would be compiled again. No kernel is attributed."""
    side.generate(
        prompts, new_tokens
    )  # other settings may have run since: what they changed is compiled or captured here
    generation, trace = traced(lambda: side.generate(prompts, new_tokens), prompts.device)
    events = trace.everything
    of_tokens = by_token(events, generation)
    entries = [kernel_entries(step, [], []) for step in of_tokens]
    until_first = max(0.0, events[0].start - generation.start) if events else 0.0
    middle = _middle(new_tokens)
    return GpuSteps(
        entries[:1], [entries[i] for i in middle], until_first, between=_between([of_tokens[i] for i in middle])
    )


def _between(steps: Sequence[Sequence[Event]]) -> float:
    """Seconds from the end of a step to the start of the next, the median; infinite where there are no two."""
    idle = [
        max(0.0, after[0].start - max(event.ended for event in before))
        for before, after in itertools.pairwise(step for step in steps if step)
    ]
    return statistics.median(idle) if idle else math.inf


def _prompt(side: Side, prompts: Tensor) -> tuple[list[Entry], float]:
    generation, trace = traced(lambda: side.generate(prompts, 1), prompts.device)
    events = trace.everything
    known, ops = _generation_by_ops(side, prompts, 1)
    entries = kernel_entries(by_token(events, generation)[0], known[0], ops)
    return entries, max(0.0, events[0].start - generation.start) if events else 0.0


def _generation_by_ops(side: Side, prompts: Tensor, tokens: int) -> tuple[list[list[Event]], list[Op]]:
    """The same, each op in a range of its own."""
    counter = OpCounter(module_of(side), annotate=True)
    (generation, _), trace = traced(lambda: count(side, prompts, tokens, counter), prompts.device)
    return by_token(trace.launched, generation), counter.ops


def _step_by_ops(
    side: EngineSide, captured: Recorded[Any], needs: Needs, device: torch.device
) -> tuple[list[Event], list[Op]]:
    """A step that was replayed, on the inputs of its last replay, op by op. It writes what that has written once more."""
    llm = side.llm
    counter = OpCounter(llm.decoder, annotate=True)
    side.watch(counter.on_phase)

    def step() -> None:
        with torch.inference_mode(), counter.listening():
            llm._core.runner.decode(captured.inputs, needs)

    try:
        _, trace = traced(step, device)
    finally:
        side.watch(None)
    return trace.launched, counter.ops


def _copies(trace: Trace, replays: Sequence[Sequence[Event]]) -> float:
    """Seconds of what runs between two replays, in the middle of those."""
    starts = [replay[0].start for replay in replays]
    between = [event.duration for event in trace.launched if starts[0] <= event.start < starts[-1]]
    return sum(between) / max(1, len(starts) - 1)


def _span(captured: Recorded[Any], replays: int = 20) -> float:
    """Seconds from one replay of a step to the next, when the host is far ahead."""
    seconds = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(replays):
            captured.recording.replay()
        end.record()
        end.synchronize()
        seconds.append(1e-3 * float(start.elapsed_time(end)) / replays)
    return statistics.median(seconds)
