"""What nvidia-smi is asked, and of which GPU."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_fast.benchmarks.suite.record import machine_folder
from llama_fast.profiler import machine as machine_module
from llama_fast.profiler.machine import gpu_state, machine, require_one_machine


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


def test_processors_of_one_name_are_told_apart_by_what_their_kernels_are_compiled_for(monkeypatch):
    """A hypervisor may hide a matrix unit: figures of the two are not of one machine."""
    monkeypatch.setattr(machine_module, "host", lambda: SimpleNamespace(name="amx"))
    with_amx = machine(torch.device("cpu"))
    monkeypatch.setattr(machine_module, "host", lambda: SimpleNamespace(name="avx512"))
    without = machine(torch.device("cpu"))
    assert with_amx["processor"].endswith(", AMX") and without["processor"].endswith(", AVX-512")
    assert machine_folder(with_amx) != machine_folder(without)
    with pytest.raises(ValueError, match="measured on two machines"):
        require_one_machine(with_amx, without)
