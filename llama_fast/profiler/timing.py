"""Timing several implementations side by side, so that what the machine does to one it does to all.

On a GPU each is captured in a CUDA graph of many calls, with L2 emptied before each call; the same graph without the calls is replayed
beside it, and the difference is the calls' own time. No host cost and no event's cost is in it, and a cold cache, as in a model. On a
CPU a sample is a run of calls long enough for the clock. Either way the implementations take turns, and every sample is kept.

What its caller launches one by one is timed by the host's clock, from an idle GPU until it is idle again. A call that waits for the GPU
can be in no graph: it is launched by the host, and timed by events.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.read_stream import read_stream

Call = Callable[[], object]

_MOST_CALLS_IN_GRAPH = 20
_SAMPLE_SECONDS = 2e-3  # a sample is about so long: what a clock or an event costs is lost in it
_SPREAD_WARNING = 0.02


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
    sampler = _cpu_sampler if device.type != "cuda" else _gpu_sampler if graphs else _host_sampler
    samplers = {name: sampler(call, device) for name, call in calls.items()}
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


def _cpu_sampler(call: Call, _: torch.device) -> _Sampler:
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


def _gpu_sampler(call: Call, device: torch.device) -> _Sampler:
    """A sample is the mean of the calls in a graph: as many as take `_SAMPLE_SECONDS`, and 20 at most."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.ones(int(1.5 * l2_bytes) // 4, device=device)

    def flush_and_call() -> None:
        read_stream(flush)
        call()

    def once() -> float:
        return _elapsed(call)

    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles and allocates, which a capture cannot
        read_stream(flush)
        seconds = _stable(once)
        waits = _waits(call)
    torch.cuda.current_stream(device).wait_stream(stream)
    if waits:
        return _Sampler(lambda: _elapsed_after(flush, call), waits=True)
    count = max(1, min(_MOST_CALLS_IN_GRAPH, round(_SAMPLE_SECONDS / seconds)))
    with_calls = _captured(flush_and_call, count, stream)
    without = _captured(lambda: read_stream(flush), count, stream)

    def sample() -> float:
        return max(0.0, _elapsed(with_calls.replay) - _elapsed(without.replay)) / count

    _stable(sample)
    return _Sampler(sample)


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


def _elapsed_after(flush: Tensor, call: Call) -> float:
    read_stream(flush)
    return _elapsed(call)


def _captured(call: Call, count: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                call()
    except (
        RuntimeError
    ):  # it leaves the generator of random numbers in the state of a capture, in which it refuses to draw
        generator = torch.cuda.default_generators[stream.device.index]
        generator.graphsafe_set_state(torch.Generator(stream.device).graphsafe_get_state())
        raise
    return graph


def _elapsed(work: Call) -> float:
    """Seconds on the GPU, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))
