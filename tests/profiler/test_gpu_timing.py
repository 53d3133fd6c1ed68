"""Timing on a GPU: the arithmetic with an invented one, whose host is slow, and then a real one where there is one."""

import contextlib
import gc
import statistics
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast.profiler.measure import timing
from llama_fast.profiler.measure.timing import time_interleaved

CPU = torch.device("cpu")
LAUNCH, FLUSH = 5e-6, 25e-6  # seconds that the host takes for a node, and the GPU to empty its cache


class InventedGpu:
    """Host and GPU as two clocks: the GPU begins what it is given when it has ended all before, and not before it is given."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.captured: list[float] | None = None
        self.current = "default"
        self.flushed: list[weakref.ref[Tensor]] = []
        self.ended: list[str] = []

    def run(self, seconds: float) -> None:
        if self.captured is not None:
            self.captured.append(seconds)
        else:
            self.launch([seconds])

    def launch(self, kernels: list[float]) -> None:
        self.host += LAUNCH * len(kernels)
        self.gpu = max(self.gpu, self.host) + sum(kernels)

    def read_stream(self, x: Tensor) -> None:
        self.flushed.append(weakref.ref(x))
        self.run(FLUSH)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        yield
        self.current = before

    @contextlib.contextmanager
    def capture(self, graph: "InventedGraph", *, pool: str, stream: Any) -> Iterator[None]:
        self.captured, self.current = graph.kernels, "side"
        try:
            yield  # if it fails, PyTorch leaves the stream as it is
        finally:
            self.captured = None
        self.current = "default"


class InventedGraph:
    def __init__(self) -> None:
        self.kernels: list[float] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> InventedGpu:
    gpu = InventedGpu()

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self) -> None:
            gpu.host += 1e-6
            self.at = max(gpu.gpu, gpu.host)

        def elapsed_time(self, other: "Event") -> float:
            return 1e3 * (other.at - self.at)

        def synchronize(self) -> None:
            gpu.host = max(gpu.host, self.at)

    def replay(graph: InventedGraph) -> None:
        gpu.launch(graph.kernels)

    monkeypatch.setattr(InventedGraph, "replay", replay, raising=False)
    monkeypatch.setattr(timing, "read_stream", gpu.read_stream)
    monkeypatch.setattr(
        timing, "_side_stream", lambda device: SimpleNamespace(device=CPU, wait_stream=lambda other: None)
    )
    for name, value in {
        "CUDAGraph": InventedGraph, "graph": gpu.capture, "Event": Event, "stream": lambda stream: gpu.stream("side"),
        "current_stream": lambda device: SimpleNamespace(name=gpu.current, wait_stream=lambda other: None),
        "set_stream": lambda stream: setattr(gpu, "current", stream.name), "graph_pool_handle": lambda: "pool",
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return gpu


def seconds_of(call: Callable[[], object]) -> float:
    sampler = timing._Graphs(CPU).sampler(call)
    return statistics.median(sampler.sample() for _ in range(5))


@pytest.mark.parametrize("seconds", [3e-6, 1e-3, 30e-3])
def test_the_time_of_a_call_has_nothing_of_the_host_and_of_the_flush(gpu: InventedGpu, seconds: float) -> None:
    assert seconds_of(lambda: gpu.run(seconds)) == pytest.approx(seconds, rel=1e-6)


def test_many_short_calls_are_in_a_graph_even_if_the_host_is_slow(gpu: InventedGpu) -> None:
    """Their number is from the time that the GPU takes: a sample of one such call would be lost in an event's resolution."""
    graphs: list[int] = []

    def call() -> None:
        gpu.host += 4e-3
        gpu.run(10e-6)
        if gpu.captured is not None:
            graphs.append(len(gpu.captured))

    assert seconds_of(call) == pytest.approx(10e-6, rel=1e-6)
    assert max(graphs) == 2 * timing._MOST_CALLS_IN_GRAPH


def test_a_call_of_no_time_has_some(gpu: InventedGpu) -> None:
    """Rates are divided by it."""
    assert 0 < seconds_of(lambda: None) < 1e-8


def test_what_a_graph_reads_is_there_as_long_as_the_graph_is(gpu: InventedGpu) -> None:
    sampler = timing._Graphs(CPU).sampler(lambda: gpu.run(1e-5))
    gc.collect()
    kept = [part() for part in gpu.flushed]
    assert None not in kept and sampler.sample() > 0
    assert len({part.data_ptr() for part in kept if part is not None}) == timing._FLUSHES


def test_a_failed_capture_ends(gpu: InventedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch leaves the side stream current then, and before 2.12 the allocator recording: the next empty_cache would fail."""
    generator = SimpleNamespace(graphsafe_set_state=lambda state: gpu.ended.append("random numbers"))
    monkeypatch.setattr(torch.cuda, "default_generators", {None: generator})
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: gpu.ended.append(pool), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: gpu.ended.append(pool), raising=False)
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(graphsafe_get_state=lambda: None))

    def call() -> None:
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing._Graphs(CPU).sampler(call)
    assert gpu.current == "default" and gpu.ended == ["pool", "pool", "random numbers"]


# On a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
CUDA = torch.device("cuda")


@on_gpu
def test_twice_the_work_takes_twice_as_long() -> None:
    x, y = torch.ones(1 << 26, device=CUDA), torch.empty(1 << 26, device=CUDA)
    tiny = torch.zeros(1, device=CUDA)

    def twice() -> None:
        y.copy_(x)
        y.copy_(x)

    calls: dict[str, timing.Call] = {"once": lambda: y.copy_(x), "twice": twice, "tiny": lambda: tiny.add_(1)}
    timed = time_interleaved(calls, CUDA, seconds=0.2)
    assert 1.5 < timed["twice"].median / timed["once"].median < 2.7  # other tests may run on the same GPU
    assert 1e-7 < timed["tiny"].median < 0.2 * timed["once"].median


@on_gpu
def test_training_is_captured_and_its_memory_given_back() -> None:
    x = torch.randn(2048, 2048, device=CUDA, requires_grad=True)
    given = torch.ones(2048, 2048, device=CUDA)

    def call() -> object:
        return torch.autograd.grad(torch.softmax(x @ x, -1), x, given)

    call()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    timed = time_interleaved(dict.fromkeys("abcd", call), CUDA, seconds=0.05)
    assert all(1e-5 < each.median < 1e-2 and not each.waits for each in timed.values())
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (256 << 20)  # workspaces of cuBLAS


@on_gpu
def test_after_a_capture_that_fails_all_goes_on() -> None:
    x = torch.ones(1 << 20, device=CUDA)

    def breaks_a_capture() -> None:
        x.add_(1)
        torch.cuda.synchronize()

    with pytest.raises(RuntimeError):
        time_interleaved({"a": breaks_a_capture}, CUDA, seconds=0.0)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    torch.randn(8, device=CUDA)
    assert time_interleaved({"a": lambda: x.add_(1)}, CUDA, seconds=0.0)["a"].median > 0
