"""RoPE: bound by memory. Forward reads and writes q and k; backward reads and writes their gradients."""

import functools

import torch

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape, angles, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """The heads of two models, in batches of prompts."""
    return [
        OpCase(
            "rope", f"{model.name}, {batch} x {seq}", dtype, direction, peers.rope,
            functools.partial(_problem, model=model, batch=batch, seq=seq, dtype=dtype, direction=direction),
        )
        for model, batch, seq in _sizes(device, quick)
        for dtype in dtypes(device, quick=quick)
        for direction in (FORWARD, TRAINING)
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[tuple[ModelShape, int, int]]:
    if device.type != "cuda":
        return [(LLAMA_3_2_1B, 1, 128)] if quick else [(LLAMA_3_2_1B, 1, 512), (LLAMA_3_1_8B, 1, 512)]
    sizes = [(LLAMA_3_1_8B, 1, 8192), (LLAMA_3_1_8B, 8, 2048), (LLAMA_3_2_1B, 1, 8192)]
    return sizes[:1] if quick else sizes


def _problem(
    device: torch.device, *, model: ModelShape, batch: int, seq: int, dtype: torch.dtype, direction: str
) -> Problem:
    # in memory (batch, seq, heads, head_dim), as the projections leave them
    q, k = (
        torch.randn(batch, seq, heads, model.head_dim, device=device, dtype=dtype).transpose(1, 2)
        for heads in (model.heads, model.kv_heads)
    )
    cos, sin = (x[None].to(dtype) for x in angles(model, torch.arange(seq, device=device)))
    work = Work.moving(reads=[q, k, cos, sin], writes=[q, k]) * (2 if direction == TRAINING else 1)
    return Problem((q, k, cos, sin), reference.rope, work, differentiable=(0, 1))
