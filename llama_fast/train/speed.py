"""How fast a run is beside what its machine can do: MFU, the share of the machine's rate of products.

    MFU = tokens/s x FLOPs of a token / (processes x FLOP/s of one)        FLOPs by `work.training_flops`

On a GPU the rate is the published one of dense bfloat16 products, where it is known; on a CPU there is none to be trusted (clocks,
cores that others use too), so it is measured.
"""

import functools
import resource
import sys
from dataclasses import dataclass

import torch
from torch import distributed

from ..profiler.measure.limits import matmul_rate

_PUBLISHED = {
    "A100": 312e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "L4": 121e12, "L40S": 362e12, "A10": 125e12, "RTX 4090": 165e12, "MI300X": 1307e12,
}  # fmt: skip
"""FLOP/s of dense products of bfloat16, summed in float32, by words of a GPU's name: data sheets of NVIDIA and AMD."""


@dataclass(frozen=True)
class Peak:
    """The rate of products of all processes together, and where the figure is from."""

    flops_per_s: float
    source: str


def peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """None where nobody knows: another GPU, or float32 on one."""
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        return Peak(processes * _measured(name, torch.get_num_threads()), f"the fastest {name} product measured here")
    gpu = torch.cuda.get_device_name(device)
    return published(gpu, processes) if dtype == torch.bfloat16 else None


def published(gpu: str, processes: int = 1) -> Peak | None:
    """Of GPUs of this name, as PyTorch tells it ("NVIDIA H100 80GB HBM3")."""
    words = f" {gpu} ".replace("-", " ")
    found = [rate for name, rate in _PUBLISHED.items() if f" {name} " in words]
    return Peak(processes * found[0], f"the published bfloat16 products of {gpu}") if found else None


@functools.cache  # half a second
def _measured(dtype: str, threads: int) -> float:
    with torch.inference_mode():
        return matmul_rate(torch.device("cpu"), getattr(torch, dtype), seconds=0.2)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has had at a time, of a GPU's memory or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
