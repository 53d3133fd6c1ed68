"""llvmlite, or that it is not installed: without it there are no native kernels, and all else works.

Only this package's files say `from .llvmlite_compat import llvm`; whoever has a `Machine` of this computer
(`machine.host()`) may take it that `llvm()` is there. To import llvmlite takes 85 ms, so it is first done where it is used.
"""

import functools
import importlib.util
from typing import Any

__all__ = ["has_llvmlite", "llvm", "llvmlite_version"]


def has_llvmlite() -> bool:
    """Whether llvmlite is installed; it is not imported for that."""
    return importlib.util.find_spec("llvmlite") is not None


@functools.cache
def llvm() -> Any:
    """llvmlite's binding, ready to link code for this CPU; None where it is not installed.

    Its targets take 2 MB of memory, and those of all CPUs 10 more: they are initialised where something is compiled.
    """
    if not has_llvmlite():
        return None
    import llvmlite.binding as binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


def llvmlite_version() -> str:
    """Its version, where it is installed."""
    import llvmlite

    return str(llvmlite.__version__)
