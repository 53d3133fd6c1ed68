"""RMSNorm: bound by memory. Forward reads x and the weight and writes y; backward reads x and dy and writes dx."""

import functools

import torch

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import dtypes, models, prompt_tokens
from llama_fast.benchmarks.suite import FORWARD, TRAINING, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """Each width of the models, each number of tokens."""
    return [
        OpCase(
            "rms_norm", f"{tokens} x {width}", dtype, direction, peers.rms_norm,
            functools.partial(_problem, tokens=tokens, width=width, dtype=dtype, training=direction == TRAINING),
        )
        for width in sorted({model.hidden for model in models(device, quick=quick)})
        for tokens in prompt_tokens(device, quick=quick)
        for dtype in dtypes(device)
        for direction in (FORWARD, TRAINING)
    ]  # fmt: skip


def _problem(device: torch.device, *, tokens: int, width: int, dtype: torch.dtype, training: bool) -> Problem:
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(width, device=device, dtype=dtype)
    work = Work.moving(reads=[x, weight], writes=[x])
    if training:
        work += Work.moving(reads=[x, x, weight], writes=[x, weight])
    return Problem((x, weight), functools.partial(reference.rms_norm, eps=1e-5), work)
