"""Environment variables that choose how kernels run: LLAMA_FAST_CPU, LLAMA_FAST_CPU_TARGET, LLAMA_FAST_CHECK_BOUNDS."""

import os

CHECK_BOUNDS = "LLAMA_FAST_CHECK_BOUNDS"


class EnvironmentVariableError(ValueError):
    """A variable has a value that means nothing, or nothing on this computer. The command line prints it without a traceback."""


def bounds_asked_for() -> bool:
    """Whether the environment asks for checks of bounds."""
    asked = os.environ.get(CHECK_BOUNDS, "0")
    if asked not in ("", "0", "1"):
        raise EnvironmentVariableError(f"{CHECK_BOUNDS} must be 0 or 1, got {asked!r}")
    return asked == "1"
