"""CUDA graphs of the decoding step: model, sampling and all, launched by the host as one."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from .cache import KVCache
from .paged import StepInputs
from .sampling import Needs, Sampled
from .scheduler import Chunk

Step = Callable[[StepInputs, Needs], Sampled]

_FEWEST_BLOCKS = 64  # a row's, in a graph


@dataclass(frozen=True)
class Captured:
    """A step as a graph."""

    graph: torch.cuda.CUDAGraph
    inputs: StepInputs  # the tensors it reads
    sampled: Sampled  # the tensors it writes


class DecodingGraphs:
    """The decoding steps that were captured, each when it was first needed.

    A graph's key holds what is baked into it: rows (a power of two), blocks a row (64, 256, 1024, ...: a row of 128k tokens has
    8192, and the host would write them all down at each step of a short one), and what its rows need of the sampler. Cache, weights
    and the sampler's tables must stay where they are; PyTorch's switches (TF32, determinism) are those of the capture.

    All graphs share one pool of memory, so that together they take little more than the largest. What one has written
    is lost when any is replayed: the caller has it copied before, on the same stream.

    Args:
        step: what is captured. It must not wait for the device, and give padding rows (`padding_row`) an effect on nothing else.
        cache: that it runs over.
        device: the GPU, which must be the current one in `replay`.
        longest: tokens of the longest sequence.
        console: gets a line for each capture.

    Attributes:
        bytes: what the graphs take of the device's memory.
    """

    def __init__(
        self, step: Step, cache: KVCache, device: torch.device, *, padding_row: int, longest: int, console: Console
    ) -> None:
        self._step, self._cache, self._device, self._padding_row = step, cache, device, padding_row
        self._most_blocks, self._console = -(-longest // cache.block_size), console
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._of_variants: dict[Hashable, dict[tuple[int, int, Needs], Captured]] = {}
        self.use(None)
        self.bytes = 0
        self.last: tuple[Captured, Needs] | None = None  # what was replayed last: the profiler runs it again

    def replay(self, chunks: Sequence[Chunk], needs: Needs) -> Sampled:
        """The step of `chunks`, of one token each."""
        rows = 1 << (len(chunks) - 1).bit_length()
        blocks = _FEWEST_BLOCKS
        while blocks < max(len(chunk.sequence.blocks) for chunk in chunks):
            blocks *= 4
        blocks = min(blocks, self._most_blocks)
        captured = self._captured.get((rows, blocks, needs))
        if captured is None:
            captured = self._captured[rows, blocks, needs] = self._capture(self._inputs((), rows, blocks), needs)
        captured.inputs.copy_(self._inputs(chunks, rows, blocks))
        captured.graph.replay()
        self.last = captured, needs
        return captured.sampled

    def use(self, variant: Hashable) -> None:
        """From now on the step computes in another way: its graphs are others, and are kept beside those of before."""
        self._captured = self._of_variants.setdefault(variant, {})

    def _inputs(self, chunks: Sequence[Chunk], rows: int, blocks: int) -> StepInputs:
        padded = dict(rows=rows, blocks=blocks, padding_row=self._padding_row)
        return StepInputs.of(chunks, self._cache, self._device, **padded)

    def _capture(self, inputs: StepInputs, needs: Needs) -> Captured:
        """Captures a step of padding rows, after a warm-up that runs it."""
        start = time.perf_counter()
        # on the stream of the capture: what libraries keep for each stream is then there before
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # compiles and loads what was not yet, which a capture cannot
            for _ in range(2):
                self._step(inputs, needs)
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # as the capture will: the difference is then what it takes
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # what other threads do on the GPU meanwhile is none of its business
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            sampled = self._step(inputs, needs)
        size = torch.cuda.memory_reserved() - before
        self.bytes += size
        rows, seconds = len(inputs.cache_lens), time.perf_counter() - start
        self._console.print(f"captured the decoding step of {rows} rows in {seconds:.1f} s, {size / 2**20:.0f} MiB")
        return Captured(graph, inputs, sampled)
