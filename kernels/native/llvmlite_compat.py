"""llvmlite, or None where it is not installed: without it there are no native kernels, and all else works.

Only `codegen.py` and `machine.py` say `from .llvmlite_compat import llvm`; whoever has a `Machine` of this computer
(`machine.host()`) may take it that `llvm` is there.
"""

from typing import Any

__all__ = ["LLVMLITE_VERSION", "llvm"]

try:
    import llvmlite
    import llvmlite.binding as _binding
except ModuleNotFoundError as error:
    if error.name != "llvmlite":
        raise
    _binding, _version = None, None
else:
    _version = llvmlite.__version__
    _binding.initialize_all_targets()  # 1 ms; the tests compile for CPUs that are not here
    _binding.initialize_all_asmprinters()

llvm: Any = _binding
LLVMLITE_VERSION: str | None = _version
