"""What this machine can do at best, measured: the rates that every figure is a share of."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ...decoder.model import Linear
from ...kernels.huge_pages import prefer_huge_pages
from ...kernels.native import machine
from ...kernels.read_stream import read_stream
from .timing import Call, time_interleaved
from .work import Work

_ROW = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Limits:
    """Measured rates, those of the fastest sample: what else a machine does must not lower its limits.

    Bytes of a copy count twice: read and written.

    Attributes:
        read_bytes_per_s: of a stream that is only read.
        copy_bytes_per_s: of a copy from memory to memory.
        matmul_flops_per_s: of a large square matrix product, by the dtype's name.
        launch_s: from one small kernel to the next, launched one by one by the host; on a CPU a small op's call.
        graph_node_s: one more small kernel in a CUDA graph; None on a CPU.
        cache_bytes: of the last cache before memory: work that fits into it can be faster than these bandwidths.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]
    launch_s: float
    graph_node_s: float | None
    cache_bytes: int

    def memory_floor_s(self, work: Work) -> float:
        """The least time to move `work`'s bytes: what is read and written in pairs at the rate of a copy, the rest as a read."""
        pairs = min(work.read, work.written)
        return 2 * pairs / self.copy_bytes_per_s + (work.bytes - 2 * pairs) / self.read_bytes_per_s

    def compute_floor_s(self, work: Work, dtype: torch.dtype) -> float:
        """The least time for `work`'s FLOPs, at the rate of a matrix product of `dtype`."""
        return work.flops / self.matmul_flops_per_s[str(dtype).removeprefix("torch.")]

    def floor_s(self, work: Work, dtype: torch.dtype) -> float:
        """No implementation is faster, unless the caches hold what it reads: the larger of the two floors."""
        return max(self.memory_floor_s(work), self.compute_floor_s(work, dtype))


def measure_limits(device: torch.device, *, quick: bool = False) -> Limits:
    """Measures the machine: about 10 seconds, or 2 if `quick`."""
    seconds = 0.2 if quick else 1.0
    cache = cache_bytes(device)
    with torch.inference_mode():
        # in 0.2 s a CPU that was idle may get no further than half of its bandwidth
        read, copy = _bandwidths(device, cache, max(seconds, 0.5))
        matmul = {str(dtype).removeprefix("torch."): matmul_rate(device, dtype, seconds) for dtype in DTYPES}
        return Limits(read, copy, matmul, _launch_seconds(device), _graph_node_seconds(device), cache)


def _bandwidths(device: torch.device, cache: int, seconds: float) -> tuple[float, float]:
    elements = (1 << 28) if device.type == "cuda" else min(max(4 * cache, 1 << 26), 1 << 29) // 4
    x, y = (torch.empty(elements, device=device) for _ in range(2))
    prefer_huge_pages([x, y])  # as weights lie: a limit over small pages would be half of what they are read at
    x.uniform_()
    reads = readers(x)
    timed = time_interleaved(reads | {"copy": lambda: y.copy_(x)}, device, seconds=seconds)
    return 4 * elements / min(min(timed[name].samples) for name in reads), 8 * elements / min(timed["copy"].samples)


def readers(x: Tensor) -> dict[str, Call]:
    """What reads x (elements,) float32 and writes next to nothing: the fastest of them shows at which rate that can be done.

    On a CPU also a product of rows with a vector. On two threads of an Intel Xeon a sum read 220 MB at 25 GB/s, and the product at 30.
    """
    found: dict[str, Call] = {"sum": lambda: read_stream(x)}
    if x.device.type == "cpu":
        rows = x[: x.numel() // _ROW * _ROW].view(-1, _ROW)
        ones = x.new_ones(_ROW)
        found["product"] = lambda: rows @ ones
    return found


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Of a product with random numbers (zeros would draw less power and run faster); on a CPU also of one in oneDNN's layout.

    On an AMD EPYC PyTorch's own float32 product had 222 GFLOP/s, and that one 506: the lower rate would be no limit.
    """
    if device.type == "cuda":
        size = 4096 if dtype == torch.float32 else 8192
    else:  # a CPU may have no float16 product: PyTorch's own takes 2.4 s at 1024 (two cores of an AMD EPYC)
        size = 256 if dtype == torch.float16 else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products: dict[str, Call] = {"PyTorch": lambda: a @ b}
    if device.type == "cpu":
        linear = Linear(size, size, dtype=dtype)
        linear.weight.data.copy_(b)
        linear.pack()
        products["oneDNN"] = lambda: linear(a)
    timed = time_interleaved(products, device, seconds=seconds, min_samples=20)
    return 2 * size**3 / min(sample for timing in timed.values() for sample in timing.samples)


def _launch_seconds(device: torch.device, count: int = 1000) -> float:
    x = torch.zeros(1, device=device)
    seconds = []
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        _synchronize(device)
        seconds.append((time.perf_counter() - start) / count)
    return statistics.median(seconds)


def _graph_node_seconds(device: torch.device, nodes: int = 200) -> float | None:
    if device.type != "cuda":
        return None
    x = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(nodes):
            x.add_(1)

    return time_interleaved({"chain": chain}, device, seconds=0.1)["chain"].median / nodes


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """A GPU's L2; a CPU's last-level cache, as Linux tells it, or 32 MiB where it does not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return machine.cache_bytes()
