"""What a figure was measured on, and when: processor, GPU and its state, versions, commit, day."""

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..environment import versions


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on, for a result file, and the day (UTC) it was measured."""
    found: dict[str, Any] = {
        "processor": _cpu_name(), "threads": torch.get_num_threads(), "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": _commit(Path(__file__).resolve().parents[2]), "versions": versions(),
    }  # fmt: skip
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "gpu_state": gpu_state(device)}
    return found


def _commit(root: Path) -> str | None:
    """Of llama-fast's own checkout, with "-dirty" if files differ from it; elsewhere `LLAMA_FAST_COMMIT`."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = ""
    if shutil.which("git") and (root / ".git").exists():  # not the project of somebody who has installed llama-fast
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or os.environ.get("LLAMA_FAST_COMMIT")


_GPU_STATE = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu",
    "clocks_throttle_reasons.active",
)  # fmt: skip


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power, temperature and throttling of a GPU now, as nvidia-smi tells them; empty where it cannot."""
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_GPU_STATE)}",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_GPU_STATE, (value.strip() for value in done.stdout.split(",")), strict=False))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
