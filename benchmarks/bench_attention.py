"""Attention of a prompt: bound by arithmetic, two products forward and five backward, of the pairs of query and key that attend.

Sizes are those of the FlashAttention-3 paper (16k tokens, 2048 channels), and two models' own.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import LLAMA_3_1_8B, MISTRAL_7B, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, recomputed, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work, attended_pairs, attention_flops

test_speed = speed_test


@dataclass(frozen=True)
class _Size:
    batch: int
    heads: int
    kv_heads: int
    seq: int
    head_dim: int
    causal: bool = True
    window: int | None = None
    name: str = ""
    trains: bool = True

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        pattern = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        return f"{self.name}{self.batch} x {self.seq}, {heads} heads of {self.head_dim}, {pattern}"


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """Sizes over sequence length, pattern and head_dim."""
    return [
        OpCase(
            "attention", str(size), dtype, direction,
            functools.partial(
                peers.attention, causal=size.causal, window=size.window, scores=size.batch * size.heads * size.seq**2
            ),
            functools.partial(_problem, size=size, dtype=dtype, direction=direction),
        )
        for size in _sizes(device, quick)
        for dtype in dtypes(device, quick=quick)
        for direction in ((FORWARD, TRAINING) if size.trains else (FORWARD,))
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[_Size]:
    if device.type != "cuda":
        if quick:
            return [_Size(1, 4, 1, 128, 64)]
        sizes = [_Size(1, 12, 12, seq, head_dim) for seq in (512, 2048) for head_dim in (64, 128)]
        return [*sizes, _Size(1, 12, 4, 512, 64, window=128, trains=False)]
    if quick:
        return [_Size(4, 16, 16, 4096, 128)]
    llama, mistral = LLAMA_3_1_8B, MISTRAL_7B
    return [
        _Size(4, 16, 16, 4096, 128),
        _Size(2, 16, 16, 8192, 128, trains=False),
        _Size(1, 16, 16, 16384, 128),
        _Size(1, 16, 16, 16384, 128, causal=False),
        _Size(4, 32, 32, 4096, 64, trains=False),
        _Size(1, 32, 32, 16384, 64),
        _Size(2, llama.heads, llama.kv_heads, 8192, llama.head_dim, name="Llama-3.1-8B, "),
        _Size(1, mistral.heads, mistral.kv_heads, 16384, mistral.head_dim, window=mistral.window, name="Mistral-7B, "),
    ]


def _problem(device: torch.device, *, size: _Size, dtype: torch.dtype, direction: str) -> Problem:
    # in memory (batch, seq, heads, head_dim), as the projections leave them
    q, k, v = (
        torch.randn(size.batch, size.seq, heads, size.head_dim, device=device, dtype=dtype).transpose(1, 2)
        for heads in (size.heads, size.kv_heads, size.kv_heads)
    )
    pairs = size.batch * attended_pairs(size.seq, size.seq, causal=size.causal, window=size.window)
    flops = attention_flops(pairs, size.heads, size.head_dim, backward=direction == TRAINING)
    work = Work.moving(reads=[q, k, v], writes=[q], flops=flops)
    if direction == TRAINING:
        work += Work.moving(reads=[q, k, v, q, q], writes=[q, k, v])
    return Problem((q, k, v), functools.partial(_reference, causal=size.causal, window=size.window), work)


def _reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """A head at a time: the scores of all in float64 are too many."""
    attend = recomputed(functools.partial(reference.attention, causal=causal, window=window))
    group = q.shape[1] // k.shape[1]
    parts = (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    heads = zip(*(torch.split(x.flatten(0, 1)[:, None], 1) for x in parts), strict=True)
    return torch.cat([attend(*head) for head in heads]).view(q.shape)
