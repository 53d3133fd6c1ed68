"""What is installed, which GPU is there, and which implementation each op uses on it and why."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from . import ops
from .kernels import cpu
from .kernels.launch import INTERPRETED, gpu_of
from .kernels.native.machine import host
from .kernels.triton_compat import HAS_TRITON, triton

PACKAGES = ("torch", "triton", "llvmlite", "transformers", "numpy", "peft", "liger-kernel", "kernels")


@dataclass(frozen=True)
class Implementation:
    """How ops run on a device: `name` for people ("CPU: Triton kernels, native"), and why."""

    name: str
    reason: str


def implementation_on(device: torch.device) -> Implementation:
    """The implementation that the dispatcher picks for tensors on `device`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if not HAS_TRITON:
            return Implementation(f"{name}: none", "tensors on a GPU run Triton kernels, and Triton is not installed")
        return Implementation(
            f"{name}: Triton", f"tensors on a GPU run the Triton kernels, planned for {gpu_of(device).arch}"
        )
    if device.type != "cpu":
        return Implementation(f"{device.type}: none", f"llama-fast has no implementation for {device.type!r} tensors")
    if INTERPRETED and not HAS_TRITON:
        return Implementation(
            "CPU: none", "TRITON_INTERPRET asks for Triton's interpreter, and Triton is not installed"
        )
    if INTERPRETED:
        return Implementation("CPU: Triton's interpreter", "TRITON_INTERPRET is set: right numbers, no speed")
    return _implementation_on_cpu()


def _implementation_on_cpu() -> Implementation:
    choice, machine = cpu.chosen(), host()
    if choice == "pytorch" or machine is None:
        reason = cpu.why_not_native() or "LLAMA_FAST_CPU asks for them"
        return Implementation("CPU: PyTorch ops", f"tensors on the CPU run PyTorch's own ops: {reason}")
    rule = (
        "PyTorch's ops where those are faster"
        if choice == "auto"
        else "all that can be compiled, as LLAMA_FAST_CPU asks"
    )
    left = "".join(f"; {op} runs on PyTorch's ops: {reason}" for op, reason in cpu.fallbacks.items())
    return Implementation(
        "CPU: Triton kernels, native",
        f"tensors on the CPU run the Triton kernels, compiled for its {machine.name} instructions, and {rule}{left}",
    )


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none or the interpreter is on."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it works with; "not installed" where that is so."""
    found = {"python": platform.python_version(), "llama-fast": _version("llama-fast")}
    return found | {name: _version(name) for name in PACKAGES}


def gpus() -> list[str]:
    """A line for each GPU that PyTorch sees."""
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = gpu_of(torch.device("cuda", index))
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        lines.append(f"{torch.cuda.get_device_name(index)} ({gpu.arch}, {gpu.multiprocessors} SMs, {memory:.0f} GiB)")
    return lines


def op_names() -> list[str]:
    """The public ops."""
    return list(ops.__all__)


def _version(package: str) -> str:
    if package == "triton":  # also installed under other names, such as triton-rocm
        return str(triton.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
