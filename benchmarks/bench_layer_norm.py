"""Layer norm: bound by memory. Forward reads x and writes y; backward reads x and dy and writes dx."""

import functools

import torch

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import dtypes, rows_and_widths
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """Many widths at one number of tokens, many numbers at one width."""
    return [
        OpCase(
            "layer_norm", f"{tokens} x {width}", dtype, direction, peers.layer_norm,
            functools.partial(_problem, tokens=tokens, width=width, dtype=dtype, direction=direction),
        )
        for tokens, width in rows_and_widths(device, quick=quick)
        for dtype in dtypes(device, quick=quick)
        for direction in (FORWARD, TRAINING)
    ]  # fmt: skip


def _problem(device: torch.device, *, tokens: int, width: int, dtype: torch.dtype, direction: str) -> Problem:
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    weight, bias = (torch.randn(width, device=device, dtype=dtype) for _ in range(2))
    work = Work.moving(reads=[x, weight, bias], writes=[x])
    if direction == TRAINING:
        work += Work.moving(reads=[x, x, weight], writes=[x, weight, bias])
    return Problem((x, weight, bias), functools.partial(reference.layer_norm, eps=peers.EPS), work)
