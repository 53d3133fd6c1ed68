"""Triton, or a stand-in where it is not installed: it has wheels for Linux with glibc only.

Every file with kernels says `from .triton_compat import tl, triton`. With the stand-in it can be imported, and CPU tensors run
PyTorch's ops; whatever launches or compiles a kernel raises `TritonNotInstalledError`. A Triton that is installed and cannot be imported
raises its own error.
"""

import os
from typing import Any

__all__ = ["HAS_TRITON", "TritonNotInstalledError", "tl", "triton"]

# Triton 3.9 asks for this by name; 3.10 will turn the fusion of multiply and add off by default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


_REMEDY = (
    "Triton is not installed, and no kernel is launched or compiled without it. On Linux with glibc: pip install triton. "
    "Elsewhere keep tensors on the CPU, where ops are PyTorch's as long as TRITON_INTERPRET is not set."
)


class TritonNotInstalledError(ModuleNotFoundError):
    """A kernel was to be launched or compiled, and there is no Triton."""

    def __init__(self, message: str = _REMEDY) -> None:
        super().__init__(message, name="triton")


class _StandIn:
    """A part of Triton, or a kernel: what an import asks for it has; whatever else is asked for is missing."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions: copy, pickle, inspect
            raise AttributeError(name)
        raise TritonNotInstalledError


def _jit(function: Any = None, **options: Any) -> Any:
    return _jit if function is None else _StandIn(__name__=function.__name__)


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    interpret = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
    knobs = _StandIn(runtime=_StandIn(interpret=interpret))
    triton = _StandIn(__version__="not installed", jit=_jit, knobs=knobs, TritonError=TritonNotInstalledError)
    tl = _StandIn(constexpr=lambda value: value)

HAS_TRITON = not isinstance(triton, _StandIn)
