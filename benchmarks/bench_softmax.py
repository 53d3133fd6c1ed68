"""Softmax: bound by memory. Forward reads x and writes y; backward reads y and dy and writes dx."""

import functools

import torch

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """Rows of an attention's scores, and of a vocabulary."""
    return [
        OpCase(
            "softmax", f"{rows} x {width}", dtype, direction, peers.softmax,
            functools.partial(_problem, rows=rows, width=width, dtype=dtype, direction=direction),
        )
        for rows, width in _sizes(device, quick)
        for dtype in dtypes(device, quick=quick)
        for direction in (FORWARD, TRAINING)
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[tuple[int, int]]:
    if device.type != "cuda":
        return [(256, 2048)] if quick else [(2048, 2048), (64, 128256)]
    sizes = [(32768, 4096), (8192, 32000), (4096, 65536), (2048, 128256)]
    return sizes[:1] if quick else sizes


def _problem(device: torch.device, *, rows: int, width: int, dtype: torch.dtype, direction: str) -> Problem:
    x = torch.randn(rows, width, device=device, dtype=dtype)
    work = Work.moving(reads=[x], writes=[x])
    if direction == TRAINING:
        work += Work.moving(reads=[x, x], writes=[x])
    return Problem((x,), reference.softmax, work)
