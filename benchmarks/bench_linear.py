"""The projections of a layer, and the head: bound by the weights' bytes for the rows of a decoding step, by arithmetic for a prompt's."""

import functools

import torch
from torch import Tensor

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import CPU_125M, LLAMA_3_1_8B, LLAMA_3_1_70B_LAYER, LLAMA_3_2_1B, ModelShape, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """Each projection of a layer, with the residual where a layer adds it: 1, 16 and many rows."""
    return [
        OpCase(
            "linear", f"{model.name} {name}, {rows} x {columns} -> {out}{' + residual' * residual}", dtype, FORWARD,
            functools.partial(peers.linear, residual=residual, tune=model == LLAMA_3_1_8B),
            functools.partial(_problem, rows=rows, columns=columns, out=out, residual=residual, dtype=dtype),
        )
        for model, many in _sizes(device, quick)
        for name, out, columns, residual in _projections(model, quick)
        for rows in many
        for dtype in dtypes(device, quick=quick)
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[tuple[ModelShape, tuple[int, ...]]]:
    if device.type != "cuda":
        return [(CPU_125M, (1,))] if quick else [(CPU_125M, (1, 16, 512)), (LLAMA_3_2_1B, (1, 4))]
    if quick:
        return [(LLAMA_3_1_8B, (1, 4096))]
    return [(LLAMA_3_1_8B, (1, 16, 4096)), (LLAMA_3_2_1B, (1, 16)), (LLAMA_3_1_70B_LAYER, (1,))]


def _projections(model: ModelShape, quick: bool) -> list[tuple[str, int, int, bool]]:
    """Name, rows and columns of the weight, and whether a residual is added."""
    projections = [
        ("o", model.hidden, model.heads * model.head_dim, True),
        ("gate_up", 2 * model.intermediate, model.hidden, False),
        ("qkv", model.qkv, model.hidden, False),
        ("down", model.hidden, model.intermediate, True),
        ("head", model.vocab, model.hidden, False),
    ]
    return projections[:2] if quick else projections


def _problem(device: torch.device, *, rows: int, columns: int, out: int, residual: bool, dtype: torch.dtype) -> Problem:
    x = torch.randn(rows, columns, device=device, dtype=dtype)
    weight = torch.randn(out, columns, device=device, dtype=dtype) * columns**-0.5
    y = torch.randn(rows, out, device=device, dtype=dtype)
    inputs = (x, weight, y) if residual else (x, weight)
    return Problem(inputs, _reference, Work.moving(reads=inputs, writes=[y], flops=2 * rows * weight.numel()))


def _reference(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    return reference.linear(x, weight, residual=residual)
