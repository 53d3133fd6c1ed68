"""llama-fast, by its public `LLM`."""

from importlib.metadata import version
from typing import Any

import torch

from llama_fast import LLM
from llama_fast.profiler.measure.sides import EngineSide

VERSION = f"torch {version('torch')}"


class LlamaFast:
    def __init__(self, llm: LLM) -> None:
        self._side = EngineSide(llm)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        done = self._side.generate(torch.tensor(prompts), new)
        return done.times, done.token_ids

    def logits(self, ids: list[int]) -> Any:
        return self._side.logits(torch.tensor(ids)).float().numpy()


def load(model: str, dtype: str, threads: int, batch: int, context: int, tokens: int) -> LlamaFast:
    """`model` is a folder. The cache holds `batch` sequences, of at most `context` tokens each and `tokens` in all."""
    torch.set_num_threads(threads)
    block = 16
    llm = LLM(
        model, dtype=dtype, device="cpu", max_batch=batch, max_context=context,
        max_cache_tokens=tokens + batch * block, block_size=block, progress=False,
    )  # fmt: skip
    return LlamaFast(llm)
