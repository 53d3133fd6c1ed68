"""Decoding steps that are recorded once and replayed by one call: a CUDA graph on a GPU, a list of native launches on a CPU."""

import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console

from ..kernels.native import capture
from ..kernels.native.recorded import Recording
from .cache import KVCache
from .paged import RowWriter, StepInputs
from .scheduler import Chunk

_Output = TypeVar("_Output")

_FEWEST_BLOCKS = 64  # a row's, in a recording
_MOST_RECORDINGS = 128  # of one set of fusions


class Recorder(Protocol):
    """A machine's way to keep what a function does there.

    Attributes:
        pads: a recording is for a power of two of rows: one for each number would take long to make.
    """

    pads: bool

    @property
    def bytes(self) -> int:
        """What the recordings take of the device's memory."""

    def record(self, function: Callable[[], _Output]) -> tuple[_Output, Any]:
        """What `function` returns, and its recording, whose `replay()` computes the same tensors anew.

        Raises `NotRecordableError` where a replay would not do all that the function does.
        """


class CudaGraphs:
    """All graphs share one pool of memory, so that together they take little more than the largest. What one has written is
    lost when any is replayed: the caller has it copied before, on the same stream.

    Args:
        device: the GPU, which must be the current one in `record` and at a replay.
    """

    pads = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self.bytes = 0

    def record(self, function: Callable[[], _Output]) -> tuple[_Output, Any]:
        # on the stream of the capture: what libraries keep for each stream is then there before
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # compiles and loads what was not yet, which a capture cannot
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as the capture will: the difference is then what it takes
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # what other threads do on the GPU meanwhile is none of its business
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = function()
        self.bytes += torch.cuda.memory_reserved() - before
        return output, graph


class NativeRecordings:
    """Launches on a CPU, with the tensors that they write: 31 KiB a row of the embedded model, 2.5 MB of one of a billion parameters.

    Their machine code is not counted: it is the whole process's, 150 KiB for the kernels of a model's steps.
    """

    pads = False

    def __init__(self) -> None:
        self._kept: weakref.WeakSet[Recording] = weakref.WeakSet()

    @property
    def bytes(self) -> int:
        return sum(recording.bytes for recording in self._kept)

    def record(self, function: Callable[[], _Output]) -> tuple[_Output, Any]:
        output, recording = capture.record(function)
        self._kept.add(recording)
        return output, recording


@dataclass(frozen=True)
class Recorded(Generic[_Output]):
    """A step that can be replayed."""

    recording: Any  # of a `Recorder`
    inputs: StepInputs  # the tensors it reads
    write: Callable[[Sequence[Chunk]], None]  # brings a step's chunks there
    output: _Output  # the tensors it writes


class RecordedSteps(Generic[_Output]):
    """The decoding steps that were recorded, each when it was first needed.

    A recording's key holds what is baked into it: rows, blocks a row (64, 256, 1024, ...: a row of 128k tokens has 8192, and the host
    would write them all down at each step of a short one), and what its rows need of the sampler. Cache, weights and the sampler's
    tables must stay where they are; PyTorch's switches (TF32, determinism) are those of the recording.

    Args:
        step: what is recorded: it makes its output from the inputs and what the sampler needs. It must not wait for the device,
            and give padding rows (`padding_row`) an effect on nothing else.
        recorder: of the machine.
        cache: that it runs over.
        longest: tokens of the longest sequence.
        console: gets a line for each recording that takes long.
        phase: is told "inputs" when a step's are written.
    """

    def __init__(
        self, step: Callable[[StepInputs, Any], _Output], recorder: Recorder, cache: KVCache, *, padding_row: int,
        longest: int, console: Console, phase: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._step, self.recorder, self._cache = step, recorder, cache
        self._padding_row, self._console, self._phase = padding_row, console, phase
        self._most_blocks = -(-longest // cache.block_size)
        self._of_variants: dict[Hashable, dict[Hashable, Recorded[_Output] | None]] = {}
        self.use(None)
        self.refused: dict[Hashable, str] = {}  # why a step runs op by op
        self.last: tuple[Recorded[_Output], Any] | None = None  # what was replayed last: the profiler runs it again
        self.replays = 0

    def replay(self, chunks: Sequence[Chunk], needs: Hashable) -> _Output | None:
        """The step of `chunks`, of one token each; None where it cannot be recorded. The output is lost at the next replay."""
        rows = 1 << (len(chunks) - 1).bit_length() if self.recorder.pads else len(chunks)
        longest, blocks = max([len(chunk.sequence.blocks) for chunk in chunks]), _FEWEST_BLOCKS
        while blocks < longest:
            blocks *= 4
        key = (rows, min(blocks, self._most_blocks), needs)
        if key not in self._recorded:
            if len(self._recorded) >= _MOST_RECORDINGS:  # the oldest one
                del self._recorded[next(iter(self._recorded))]
            self._recorded[key] = self._record(*key)
        recorded = self._recorded[key]
        if recorded is None:
            return None
        self.last = recorded, needs
        return self.again(chunks)

    def again(self, chunks: Sequence[Chunk]) -> _Output:
        """What was replayed last, for as many chunks whose blocks and needs are those of the last ones."""
        assert self.last is not None
        recorded, _ = self.last
        recorded.write(chunks)
        self._phase("inputs")
        recorded.recording.replay()
        self.replays += 1
        return recorded.output

    def use(self, variant: Hashable) -> None:
        """From now on the step computes in another way: its recordings are others, and are kept beside those of before."""
        self._recorded = self._of_variants.setdefault(variant, {})

    def _record(self, rows: int, blocks: int, needs: Hashable) -> Recorded[_Output] | None:
        """Records a step of padding rows; None where a replay would not do all of it."""
        start, before = time.perf_counter(), self.recorder.bytes
        inputs = self._inputs((), rows, blocks)
        try:
            output, recording = self.recorder.record(lambda: self._step(inputs, needs))
        except capture.NotRecordableError as error:
            self.refused[rows, blocks, needs] = str(error)
            return None
        seconds, taken = time.perf_counter() - start, self.recorder.bytes - before
        if seconds > 0.5 and self._console.is_terminal:
            memory = f", {taken / 2**20:.0f} MiB" if taken >= 2**20 else ""
            plural = "s" if rows > 1 else ""
            # from a line's start: a terminal shows the text up to here
            self._console.print(f"\nrecorded the decoding step of {rows} row{plural} in {seconds:.1f} s{memory}")
        return Recorded(recording, inputs, self._writer(inputs, rows, blocks), output)

    def _writer(self, inputs: StepInputs, rows: int, blocks: int) -> Callable[[Sequence[Chunk]], None]:
        """What brings chunks into the inputs: padded and copied to a device, or written where they are."""
        if self.recorder.pads:
            return lambda chunks: inputs.copy_(self._inputs(chunks, rows, blocks))
        return RowWriter(inputs, self._cache.block_size).write

    def _inputs(self, chunks: Sequence[Chunk], rows: int, blocks: int) -> StepInputs:
        padded = dict(rows=rows, blocks=blocks, padding_row=self._padding_row)
        return StepInputs.of(chunks, self._cache, self._cache.device, **padded)
