"""Attention of a decoding step: bound by the bytes of the KV cache. "llama-fast paged" reads the same keys through a block table."""

import functools

import torch
from torch import Tensor

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work, attention_flops

test_speed = speed_test

BLOCK_SIZE = 64


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """Contexts, one row and eight, the heads of two models."""
    return [
        OpCase(
            "attention_decode", f"{model.name}, batch {batch}, context {context}", dtype, FORWARD,
            # the plain one makes k and v float32
            functools.partial(peers.attention_decode, math_bytes=8.0 * batch * model.kv_heads * context * model.head_dim),
            functools.partial(_problem, model=model, batch=batch, context=context, dtype=dtype),
        )
        for model, batch, context in _sizes(device, quick)
        for dtype in dtypes(device, quick=quick)
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[tuple[ModelShape, int, int]]:
    if device.type != "cuda":
        sizes = [(LLAMA_3_2_1B, batch, context) for batch, context in ((1, 1024), (8, 1024), (1, 8192), (1, 32768))]
        return sizes[:1] if quick else sizes
    if quick:
        return [(LLAMA_3_1_8B, 1, 8192), (LLAMA_3_1_8B, 8, 8192)]
    sizes = [(LLAMA_3_1_8B, batch, context) for batch in (1, 8) for context in (1024, 8192, 32768, 131072)]
    return sizes + [(LLAMA_3_2_1B, 1, context) for context in (1024, 8192, 32768, 131072)]


def _problem(device: torch.device, *, model: ModelShape, batch: int, context: int, dtype: torch.dtype) -> Problem:
    q = torch.randn(batch, model.heads, 1, model.head_dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, model.kv_heads, context, model.head_dim, device=device, dtype=dtype) for _ in range(2))
    lens = torch.full((batch,), context, device=device, dtype=torch.int32)
    flops = attention_flops(batch * context, model.heads, model.head_dim)
    work = Work.moving(reads=[q, k, v], writes=[q], flops=flops)
    return Problem((q, k, v, lens, _paged(k, v)), _reference, work)


def _paged(k: Tensor, v: Tensor) -> peers.Paged:
    """Copies in blocks, in a random order in memory."""
    batch, kv_heads, context, head_dim = k.shape
    blocks = batch * context // BLOCK_SIZE
    order = torch.randperm(blocks, device=k.device)  # where each block of the rows lies

    def in_blocks(x: Tensor) -> Tensor:
        rows = x.view(batch, kv_heads, -1, BLOCK_SIZE, head_dim).transpose(1, 2)
        stored = x.new_empty(blocks, kv_heads, BLOCK_SIZE, head_dim)
        stored[order] = rows.reshape(blocks, kv_heads, BLOCK_SIZE, head_dim)
        return stored

    return peers.Paged(in_blocks(k), in_blocks(v), order.view(batch, -1).int())


def _reference(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, _: peers.Paged) -> Tensor:
    return reference.attention_decode(q, k, v, lens)
