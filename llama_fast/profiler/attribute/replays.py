"""The steps that our engine replays on a CPU: how long each launch took is noted inside the replay (`Recording.stamp`), and which op it
belongs to is known from the same step run op by op, which makes the same launches."""

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...engine.placement import own_modes
from ...engine.recorded_steps import Recorded
from ...kernels.cpu import recorded_by_name
from ...kernels.native.compiled import recording
from ..measure.phases import by_token
from ..measure.sides import EngineSide, Generation, Side
from .counting import Op, OpCounter
from .kernels import Entry, Event, kernel_entries


@dataclass(frozen=True)
class Replay:
    """A step that was replayed.

    Attributes:
        recorded, needs: what it is a replay of.
        launches: as they ran; none where they were not timed.
        around: seconds of the replay beside its launches.
        ended: when, on the clock of `time.perf_counter`.
    """

    recorded: Recorded[Any]
    needs: Any
    launches: list[Event]
    around: float
    ended: float


class Replays:
    """Times the launches of the steps that a side replays. Of transformers, and of an engine that replays nothing, there are none."""

    def __init__(self, side: Side) -> None:
        self._runner = side.llm._core.runner if isinstance(side, EngineSide) else None
        self._side = side
        self._known: dict[int, tuple[Replay, list[Event], list[Op]]] = {}  # by recording, with its launches by op
        self._seen: list[Replay] = []
        self._phase_ended = 0.0
        self._replays = 0  # of the runner, as far as they were looked at

    def generate(self, prompts: Tensor, new_tokens: int) -> tuple[Generation | None, list[list[Replay]]]:
        """What is replayed for each token, after prompts that are known from before. A recording is timed from the second replay that is
        seen on. Nothing is generated where nothing is replayed."""
        if self._runner is None or self._runner.steps is None:
            return None, []
        self._seen, known = [], [replay for replay, _, _ in self._known.values()]
        self._taken()  # what was replayed before
        for replay in known:
            replay.recorded.recording.stamp(True)
        self._side.watch(self._on_phase)
        try:
            generation = self._side.generate(prompts, new_tokens, reuse=True)
        finally:
            self._side.watch(None)
            for replay in [*known, *self._seen]:
                replay.recorded.recording.stamp(False)
        for replay in self._seen:
            if id(replay.recorded) not in self._known:
                self._known[id(replay.recorded)] = replay, *self._by_ops(replay)
        return generation, by_token(self._seen, generation)

    def _on_phase(self, name: str) -> None:
        """A phase has ended. A replay is a phase of its own."""
        now, last = time.perf_counter(), self._taken()
        if last is not None:
            recorded, needs = last
            stamps = recorded.recording.stamps
            names = [launch.kernel.code.name for launch in recorded.recording.launches]
            launches = [
                Event(name, start, end - start)
                for name, (start, end) in zip(names, itertools.pairwise(stamps), strict=True)
            ]
            if stamps[0] < self._phase_ended:  # they are of an earlier replay
                launches = []
            recorded.recording.stamp(True)
            around = now - self._phase_ended - (stamps[-1] - stamps[0])
            self._seen.append(Replay(recorded, needs, launches, around, now))
        self._phase_ended = time.perf_counter()

    def entries(self, replay: Replay) -> list[Entry]:
        """The launches of a replay that was timed, with the work of their ops. What lies around them is the first one's gap."""
        _, launches, ops = self._known[id(replay.recorded)]
        first, *others = kernel_entries(replay.launches, launches, ops)
        return [replace(first, gap=max(0.0, replay.around)), *others]

    def ops(self, replay: Replay) -> list[Op]:
        """Those of the step, with the work at the first time it was seen."""
        return self._known[id(replay.recorded)][2]

    def _taken(self) -> tuple[Recorded[Any], Any] | None:
        """What was replayed since this was last asked for."""
        steps = None if self._runner is None else self._runner.steps
        if steps is None:
            return None
        seen, self._replays = self._replays, steps.replays
        return steps.last if steps.replays > seen else None

    def _by_ops(self, replay: Replay) -> tuple[list[Event], list[Op]]:
        """The launches of a step by op, and the ops: on the inputs of its last replay, whose results it writes once more."""
        assert isinstance(self._side, EngineSide) and self._runner is not None
        llm = self._side.llm
        with recorded_by_name(), recording() as launches:
            counter = _LaunchCounter(llm.decoder, launches)
            self._side.watch(counter.on_phase)
            try:
                with own_modes(llm.device), counter.listening():
                    self._runner.decode(replay.recorded.inputs, replay.needs)
            finally:
                self._side.watch(None)
        llm.forget_prefixes()  # a step was computed again where its sequence is no more
        names = [plan.kernel.__name__ for _, plan in launches]
        events = [Event(name, i, 0.0, op) for i, (name, op) in enumerate(zip(names, counter.op_of, strict=True))]
        return events, counter.ops


class _LaunchCounter(OpCounter):  # type: ignore[no-untyped-call]
    """Also tells the op of each of `launches`, a list that grows as ops make them: `op_of` holds its number."""

    def __init__(self, model: Any, launches: list[Any]) -> None:
        super().__init__(model)
        self._launches = launches
        self.op_of: list[int] = []

    def __torch_dispatch__(self, *call: Any, **options: Any) -> Any:
        out = super().__torch_dispatch__(*call, **options)
        self.op_of += [len(self._calls) - 1] * (len(self._launches) - len(self.op_of))
        return out
