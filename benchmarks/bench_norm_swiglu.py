"""The MLP's first kernel in a decoding step: RMSNorm, the gate and up projections, SwiGLU. Bound by the weight's bytes."""

import functools

import torch

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import ModelShape, decoding_models, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """One row and sixteen."""
    return [
        OpCase(
            "norm_swiglu", f"{model.name}, {rows} rows", dtype, FORWARD, peers.norm_swiglu,
            functools.partial(_problem, model=model, rows=rows, dtype=dtype),
        )
        for model in decoding_models(device, quick=quick)
        for rows in ((1,) if quick else (1, 16))
        for dtype in dtypes(device, quick=quick)
    ]  # fmt: skip


def _problem(device: torch.device, *, model: ModelShape, rows: int, dtype: torch.dtype) -> Problem:
    x = torch.randn(rows, model.hidden, device=device, dtype=dtype)
    norm = torch.randn(model.hidden, device=device, dtype=dtype)
    weight = torch.randn(2 * model.intermediate, model.hidden, device=device, dtype=dtype) * model.hidden**-0.5
    y = torch.empty(rows, model.intermediate, device=device, dtype=dtype)
    work = Work.moving(reads=[x, norm, weight], writes=[y], flops=2 * rows * weight.numel())
    return Problem((x, norm, weight), functools.partial(reference.norm_swiglu, eps=peers.EPS), work)
