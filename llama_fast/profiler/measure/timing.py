"""Timing several implementations side by side, so that what the machine does to one it does to all.

On a GPU each is captured in a CUDA graph of many calls, with L2 emptied before each call; the same graph without the calls is replayed
beside it, and the difference is the calls' own time: what their kernels take, and the boundaries between kernels. No host cost and no
event's cost is in it, and a cold cache, as in a model. What a call leaves in L2 to be written is written while L2 is emptied, so in its
time. On a CPU a sample is a run of calls long enough for the clock. Either way the implementations take turns, and every sample is kept.

What its caller launches one by one is timed by the host's clock, from an idle GPU until it is idle again. A call that waits for the GPU
can be in no graph: it is launched by the host, and timed by events.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.read_stream import read_stream

Call = Callable[[], object]

_MOST_CALLS_IN_GRAPH = 20
_SAMPLE_SECONDS = 2e-3  # a sample is about so long: what a clock or an event costs is lost in it
_SPREAD_WARNING = 0.02
_FLUSHES = 4  # parts of memory that are read in turn to empty L2
_LEAST_SECONDS = 1e-9  # of a difference that is lost in the noise


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, in samples. `waits`: it waits for the GPU, whose idling until the host goes on is in them."""

    samples: tuple[float, ...]
    waits: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)

    @property
    def spread(self) -> float:
        """From p20 to p80, as a share of the median."""
        return (self.p80 - self.p20) / self.median

    @property
    def is_noisy(self) -> bool:
        return self.spread > _SPREAD_WARNING


def quantile(samples: tuple[float, ...] | list[float], q: float) -> float:
    """The value that a share `q` of the samples do not exceed, interpolated between neighbours (as numpy's default)."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def time_interleaved(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float = 1.0, min_samples: int = 10, graphs: bool = True
) -> dict[str, Timing]:
    """Times each call in turn, after a warm-up, for about `seconds` each and at least `min_samples` samples.

    On a GPU the calls must be ones that a CUDA graph can hold. Without `graphs` a sample there is one call by the host's clock, with
    what launching it costs, and with whatever the call before has left in L2: right for calls of many milliseconds.
    """
    sampler = _cpu_sampler
    if device.type == "cuda" and calls:
        sampler = _Graphs(device).sampler if graphs else functools.partial(_host_sampler, device=device)
    samplers = {name: sampler(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start, rounds = time.perf_counter(), 0
    while rounds < min_samples or time.perf_counter() - start < seconds * len(names):
        shift = rounds % len(names) if names else 0  # nobody is always first
        for name in names[shift:] + names[:shift]:
            samples[name].append(samplers[name].sample())
        rounds += 1
        if not names:
            break
    return {name: Timing(tuple(values), waits=samplers[name].waits) for name, values in samples.items()}


@dataclass(frozen=True)
class _Sampler:
    """Takes a sample; `waits` as in `Timing`."""

    sample: Callable[[], float]
    waits: bool = False


def _cpu_sampler(call: Call) -> _Sampler:
    """A sample is the mean of as many calls as take `_SAMPLE_SECONDS`."""
    once = _stable(lambda: _run(call, 1))
    count = max(1, round(_SAMPLE_SECONDS / max(once, 1e-9)))
    return _Sampler(lambda: _run(call, count) / count)


def _run(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _stable(sample: Callable[[], float]) -> float:
    """The first sample that is within 10 % of the one before, of 20 at most: until then code compiles, caches fill and clocks rise."""
    once = sample()
    for _ in range(20):
        before, once = once, sample()
        if abs(once - before) < 0.1 * before:
            break
    return once


def _host_sampler(call: Call, device: torch.device) -> _Sampler:
    def once() -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    _stable(once)
    return _Sampler(once)


class _Graphs:
    """Makes the samplers of a comparison on a GPU, which share one stream and one pool of memory.

    Of the tensors that a graph makes nobody reads any after it, and only one graph runs at a time: so all may have the same memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # Each flush reads another part: what it finds of itself in L2 would depend on how much of L2 a call has used in between
        elements = int(1.5 * torch.cuda.get_device_properties(device).L2_cache_size) // 4
        self._flushed: tuple[Tensor, ...] = torch.split(torch.ones(_FLUSHES * elements, device=device), elements)
        with self._on_side_stream():
            self._flush(0)  # compiles
        self._without = {1: self._captured(_nothing, 1)}  # by the number of flushes

    def sampler(self, call: Call) -> _Sampler:
        """A sample is the mean of the calls in a graph: as many as take `_SAMPLE_SECONDS`, and 20 at most."""
        with self._on_side_stream():  # compiles and allocates, which a capture cannot
            _stable(lambda: _elapsed(call))
            waits = _waits(call)
        if waits:
            return _Sampler(lambda: self._elapsed_after_flush(call), waits=True)
        seconds = self._difference(self._captured(call, 1), self._without[1])
        count = max(1, min(_MOST_CALLS_IN_GRAPH, round(_SAMPLE_SECONDS / seconds)))
        with_calls = self._captured(call, count)
        if count not in self._without:
            self._without[count] = self._captured(_nothing, count)
        without = self._without[count]

        def sample() -> float:
            return self._difference(with_calls, without) / count

        _stable(sample)
        return _Sampler(sample)

    def _difference(self, with_calls: torch.cuda.CUDAGraph, without: torch.cuda.CUDAGraph) -> float:
        """Seconds that one graph takes longer than the other. The host launches each while the GPU is busy with the one before."""
        without.replay()
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
        start.record()
        without.replay()
        middle.record()
        with_calls.replay()
        end.record()
        end.synchronize()
        return max(_LEAST_SECONDS, 1e-3 * float(middle.elapsed_time(end) - start.elapsed_time(middle)))

    def _flush(self, number: int) -> None:
        read_stream(self._flushed[number % _FLUSHES])

    def _elapsed_after_flush(self, call: Call) -> float:
        self._flush(0)
        return _elapsed(call)

    @contextlib.contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _captured(self, call: Call, count: int) -> torch.cuda.CUDAGraph:
        """A graph of `count` times a flush and the call."""
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                for number in range(count):
                    self._flush(number)
                    call()
        except BaseException:
            torch.cuda.set_stream(current)
            _end_failed_capture(graph, self._pool, self._stream.device)
            raise
        return graph


@functools.cache  # cuBLAS keeps a workspace for each stream
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


_FAILED_GRAPHS: list[torch.cuda.CUDAGraph] = []


def _end_failed_capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Ends what PyTorch leaves begun where a capture fails: random numbers would refuse to be drawn, and (before 2.12) memory to be freed."""
    with contextlib.suppress(RuntimeError, AttributeError):  # newer versions have ended it
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
        _FAILED_GRAPHS.append(graph)  # the allocator of pinned memory still asks it what it captures
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())


def _nothing() -> None:
    pass


def _waits(call: Call) -> bool:
    """Whether a call waits for the GPU, as `.item()` does: it would fail in a capture."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def _elapsed(work: Call) -> float:
    """Seconds on the GPU, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))
