"""What nvidia-smi is asked, and of which GPU."""

import subprocess
from typing import Any

import pytest
import torch

from llama_fast.profiler.machine import gpu_state


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_the_state_of_the_gpu_that_is_visible_from_drivers_old_and_new(
    monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    def nvidia_smi(command: list[str], **_: Any) -> Any:
        fields = command[1].removeprefix("--query-gpu=").split(",")
        assert command[0] == "nvidia-smi" and command[3] == "--id=3"
        if known not in fields:
            raise subprocess.CalledProcessError(2, command)
        answers = {"clocks.sm": "1980 MHz", known: "0x0000000000000004"}
        return subprocess.CompletedProcess(
            command, 0, stdout=", ".join(answers.get(field, "?") for field in fields) + "\n"
        )

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    state = gpu_state(torch.device("cuda", 1))
    assert state["clocks.sm"] == "1980 MHz" and state["clocks_throttle_reasons.active"] == "0x0000000000000004"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.TimeoutExpired("", 1), subprocess.CalledProcessError(9, "")]
)
def test_no_state_where_nvidia_smi_tells_none(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def nvidia_smi(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    assert gpu_state(torch.device("cuda", 0)) == {}
