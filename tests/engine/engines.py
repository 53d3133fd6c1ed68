"""Engines under test, and what they did."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_fast.engine.llm import LLM
from llama_fast.engine.scheduler import Chunk
from llama_fast.kernels.launch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def engine(folder: Path | None = None, **options: Any) -> LLM:
    """An engine on the device under test; float32, unless `options` say otherwise."""
    return LLM(folder, **(dict(device=DEVICE, dtype="float32", progress=False) | options))


class Watch:
    """What the engine's scheduler decides from now on."""

    def __init__(self, llm: LLM) -> None:
        self.steps: list[list[Chunk]] = []
        self.preemptions = 0
        scheduler = llm._core.scheduler
        schedule, preempt, repeat = scheduler.schedule, scheduler.preempt, scheduler.repeat

        def watched_repeat(chunks: list[Chunk]) -> bool:
            repeats = repeat(chunks)
            if repeats:  # copies: the next step moves these on
                self.steps.append([replace(chunk) for chunk in chunks])
            return repeats

        def watched_schedule() -> list[Chunk]:
            chunks = schedule()
            self.steps.append([replace(chunk) for chunk in chunks])
            return chunks

        def watched_preempt(victim: Any) -> None:
            self.preemptions += 1
            preempt(victim)

        scheduler.schedule, scheduler.preempt, scheduler.repeat = watched_schedule, watched_preempt, watched_repeat

    @property
    def computed(self) -> int:
        """Tokens computed in all."""
        return sum(chunk.size for step in self.steps for chunk in step)


def assert_nothing_left(llm: LLM) -> None:
    """No request, and no block with a user."""
    assert llm._core.scheduler.idle and not llm._core.runs
    assert llm._core.scheduler.pool.free == llm._core.runner.cache.blocks and not any(llm._core.scheduler.pool._users)
    assert sorted(llm._core.scheduler._free_rows) == list(range(llm._core.scheduler.max_batch))
