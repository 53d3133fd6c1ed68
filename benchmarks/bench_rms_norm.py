"""RMSNorm, alone and after the residual's addition: bound by memory. Forward reads its inputs and writes y; backward reads x and dy again."""

import functools

import torch

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import dtypes, rows_and_widths
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """Many widths at one number of tokens, many numbers at one width; with a residual at one size."""
    sizes = rows_and_widths(device, quick=quick)
    return [
        OpCase(
            "rms_norm", f"{tokens} x {width}{' + residual' * residual}", dtype, direction,
            peers.add_rms_norm if residual else peers.rms_norm,
            functools.partial(_problem, tokens=tokens, width=width, dtype=dtype, direction=direction, residual=residual),
        )
        for residual in (False, True)
        for tokens, width in (sizes[:1] if residual else sizes)
        for dtype in dtypes(device, quick=quick)
        for direction in ((FORWARD,) if quick and residual else (FORWARD, TRAINING))
    ]  # fmt: skip


def _problem(
    device: torch.device, *, tokens: int, width: int, dtype: torch.dtype, direction: str, residual: bool
) -> Problem:
    x, added = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(width, device=device, dtype=dtype)
    if residual:
        work = Work.moving(reads=[x, added, weight], writes=[x, added])
        if direction == TRAINING:  # the gradient of both terms is one tensor
            work += Work.moving(reads=[x, x, x, weight], writes=[x, weight])
        return Problem((x, weight, added), _reference_with_residual, work)
    work = Work.moving(reads=[x, weight], writes=[x])
    if direction == TRAINING:
        work += Work.moving(reads=[x, x, weight], writes=[x, weight])
    return Problem((x, weight), functools.partial(reference.rms_norm, eps=peers.EPS), work)


def _reference_with_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> object:
    return reference.rms_norm(x, weight, peers.EPS, residual=residual)
