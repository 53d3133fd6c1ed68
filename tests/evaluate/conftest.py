"""The embedded model on our engine."""

import pytest

from llama_fast.engine.llm import LLM


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(device="cpu")
