"""What a figure was measured on, and when: processor, GPU and its state, versions, commit, day."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..environment import implementation_on, versions
from ..kernels.native.machine import host


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on, for a result file, and the day (UTC) it was measured."""
    found: dict[str, Any] = {
        "processor": _cpu_name(), "threads": torch.get_num_threads(), "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(Path(__file__).resolve().parents[2]), "versions": versions(),
    }  # fmt: skip
    if device.type == "cpu":
        found["kernels"] = implementation_on(device).name
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "gpu_state": gpu_state(device)}
    return found


def require_one_machine(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises ValueError where two results of `machine` are of two: of GPUs their names count alone, as what they do is timed without a host."""
    part = "gpu" if "gpu" in before or "gpu" in after else "processor"
    if before.get(part) != after.get(part):
        raise ValueError(
            f"measured on two machines: {part} {before.get(part) or 'none'}, and {after.get(part) or 'none'}; "
            "--across-machines (across_machines=True) compares them all the same"
        )


def _commit(root: Path) -> str | None:
    """Of llama-fast's own checkout, with "-dirty" if files differ from it; elsewhere `LLAMA_FAST_COMMIT`."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = ""
    if shutil.which("git") and (root / ".git").exists():  # not the project of somebody who has installed llama-fast
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or os.environ.get("LLAMA_FAST_COMMIT")


_GPU_STATE = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
_REASONS = "clocks_throttle_reasons.active"
_REASONS_ASKED = ("clocks_event_reasons.active", _REASONS)  # as drivers call them since 535, and before


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power, temperature and throttling of a GPU now, as nvidia-smi tells them; empty where it cannot."""
    for reasons in _REASONS_ASKED:
        fields = ",".join((*_GPU_STATE, reasons))
        try:
            # nvidia-smi counts all GPUs, CUDA those of CUDA_VISIBLE_DEVICES
            number = torch.cuda._get_nvml_device_index(device)
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={number}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except subprocess.CalledProcessError:
            continue
        except (OSError, subprocess.SubprocessError, RuntimeError, AttributeError):
            return {}
        values = (value.strip() for value in done.stdout.split(","))
        return dict(zip((*_GPU_STATE, _REASONS), values, strict=False))
    return {}


_INSTRUCTION_SETS = {"amx": "AMX", "avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON"}


def _cpu_name() -> str:
    """As its maker calls it, and what its kernels are compiled for: virtual machines of one processor differ in that."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    native = host()
    return name if native is None else f"{name}, {_INSTRUCTION_SETS[native.name]}"
