"""Who we are compared with, one function for each op: its implementations by name, each a function of the same inputs.

"PyTorch" is the plain one in eager mode, and the one whose own error an implementation's is judged beside. "llama-fast" is ours.
A peer that cannot run here is an `Unavailable` with the reason: results list it by name.
"""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast import ops

OURS = "llama-fast"
BASELINE = "PyTorch"


@dataclass(frozen=True)
class Unavailable:
    """Why a peer cannot run here."""

    reason: str


Implementation = Callable[..., Any]
Implementations = dict[str, Implementation | Unavailable]


def compiled(function: Implementation) -> Implementations:
    """`function` by torch.compile: as it is by default, and with its kernels tuned."""
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        missing = Unavailable("torch.compile needs a C++ compiler, and there is no g++")
        return {"torch.compile": missing}
    torch._dynamo.config.recompile_limit = 64  # each shape of a benchmark is its own program
    peers: Implementations = {"torch.compile": torch.compile(function, dynamic=False)}
    if torch.cuda.is_available():  # without its own graphs: all are captured alike
        peers["torch.compile max-autotune"] = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
    return peers


def liger(name: str, use: Callable[[Any], Implementation]) -> Implementations:
    """Liger-Kernel's implementation, which `use` takes from its package `liger_kernel.ops`."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {"Liger": Unavailable("liger-kernel is not installed")}
    if not torch.cuda.is_available():
        return {"Liger": Unavailable("liger-kernel has no CPU implementation")}
    return {"Liger": use(importlib.import_module(f"liger_kernel.ops.{name}"))}


def rms_norm() -> Implementations:
    """x (tokens, hidden), weight (hidden,)."""

    def ours(x: Tensor, weight: Tensor) -> Any:
        return ops.rms_norm(x, weight, 1e-5)

    def pytorch(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    return {OURS: ours, BASELINE: pytorch} | compiled(pytorch) | liger(
        "rms_norm", lambda module: lambda x, weight: module.LigerRMSNormFunction.apply(x, weight, 1e-5)
    )  # fmt: skip
