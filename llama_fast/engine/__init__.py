"""The generation engine: prompts in, text out."""

from .llm import EMBEDDED_MODEL, LLM
from .sampling_params import SamplingParams

__all__ = ["EMBEDDED_MODEL", "LLM", "SamplingParams"]
