"""The first kernel of a decoding step's layer: RMSNorm, the q, k and v projections, RoPE, k and v into the cache. Bound by the weight's bytes."""

import functools
from typing import Any

import torch
from torch import Tensor

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import ModelShape, angles, decoding_models, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test

BLOCK_SIZE = 64
BLOCKS = 64


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """One row and sixteen."""
    return [
        OpCase(
            "norm_qkv_rope", f"{model.name}, {rows} rows", dtype, FORWARD,
            functools.partial(peers.norm_qkv_rope, heads=model.heads, kv_heads=model.kv_heads),
            functools.partial(_problem, model=model, rows=rows, dtype=dtype),
        )
        for model in decoding_models(device, quick=quick)
        for rows in ((1,) if quick else (1, 16))
        for dtype in dtypes(device, quick=quick)
    ]  # fmt: skip


def _problem(device: torch.device, *, model: ModelShape, rows: int, dtype: torch.dtype) -> Problem:
    x = torch.randn(rows, model.hidden, device=device, dtype=dtype)
    norm = torch.randn(model.hidden, device=device, dtype=dtype)
    weight = torch.randn(model.qkv, model.hidden, device=device, dtype=dtype) * model.hidden**-0.5
    cos, sin = (each.to(dtype) for each in angles(model, torch.arange(rows, device=device) * 100))
    k_cache, v_cache = (
        torch.zeros(model.kv_heads, BLOCKS, BLOCK_SIZE, model.head_dim, device=device, dtype=dtype).transpose(0, 1)
        for _ in range(2)
    )
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, device=device)[:rows]
    qkv = torch.empty(rows, model.qkv, device=device, dtype=dtype)
    work = Work.moving(reads=[x, norm, weight, cos, sin, slots], writes=[qkv], flops=2 * rows * weight.numel())
    inputs = (x, norm, weight, cos, sin, k_cache, v_cache, slots)
    return Problem(inputs, functools.partial(_reference, heads=model.heads), work, judged=_with_cache_rows)


def _with_cache_rows(inputs: tuple[Any, ...], outputs: list[Tensor]) -> list[Tensor]:
    """q, and the rows that k and v got in the caches."""
    *_, k_cache, v_cache, slots = inputs
    return outputs + [cache.transpose(0, 1).flatten(1, 2)[:, slots] for cache in (k_cache, v_cache)]


def _reference(
    x: Tensor, norm: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, heads: int
) -> Tensor:  # fmt: skip
    return reference.norm_qkv_rope(x, norm, weight, None, cos, sin, k, v, slots, eps=peers.EPS, heads=heads)
