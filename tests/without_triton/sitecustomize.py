"""Hides Triton from every Python that starts with this folder in PYTHONPATH: `import triton` raises ModuleNotFoundError."""

import sys

sys.modules["triton"] = None  # type: ignore[assignment]
