"""What a model needs of a device's memory, told before it fails."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_UNKNOWN = 8 << 30  # bytes of memory that a machine which does not tell is taken to have


class NotEnoughMemoryError(ValueError):
    """A model does not fit on its device; the message says what takes how much, and which argument helps."""


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes: what weights, the cache of keys and values, a step's workspace and recorded steps take, and what may be taken.

    Nothing is set aside for recorded steps (CUDA graphs; on a CPU launches, with the tensors they write): they are counted as they are made.
    """

    weights: int
    kv_cache: int
    workspace: int
    available: int
    recordings: int = 0

    @property
    def needed(self) -> int:
        return self.weights + self.kv_cache + self.workspace + self.recordings

    def check(self) -> None:
        """Raises NotEnoughMemoryError where more is needed than there is."""
        if self.needed <= self.available:
            return
        if self.weights + self.workspace > self.available:
            advice = "the weights alone are too large: choose a smaller model or, if they are float32, dtype='bfloat16'"
        else:
            room = _gib(self.available - self.weights - self.workspace)
            advice = f"the KV cache is too large: {room} are left for it, so give a smaller max_cache_tokens="
        raise NotEnoughMemoryError(f"the model does not fit on the device: {advice}\n{self}")

    def __str__(self) -> str:
        rows = [("weights", self.weights), ("KV cache", self.kv_cache), ("workspace", self.workspace)]
        rows += [("recorded", self.recordings)] if self.recordings else []
        rows += [("needed", self.needed), ("available", self.available)]
        return "\n".join(f"  {name:<12}{_gib(size):>11}" for name, size in rows)


def available_bytes(device: torch.device | str) -> int:
    """How much memory can be had now: a GPU's free memory; for the CPU that of the machine, or of its container if less.

    Only Linux says what is free: on macOS it is all memory there is, on Windows 8 GiB.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else _UNKNOWN
    meminfo = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(int(most) - int(used.read_text()), 0))
    return free


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
