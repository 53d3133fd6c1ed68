"""Cross entropy: bound by memory. Forward reads the logits; forward and backward reads them and writes their gradient.

Once is enough for both: the gradient of a mean is known, but for a factor, when its row has been read. Who reads them again in the
backward pass takes that long.
"""

import functools

import torch
from torch import Tensor

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import LLAMA_3_1_8B, MISTRAL_7B, QWEN3_8B, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, recomputed, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """The vocabularies of three models."""
    return [
        OpCase(
            "cross_entropy", f"{tokens} x {vocab}", dtype, direction, peers.cross_entropy,
            functools.partial(_problem, tokens=tokens, vocab=vocab, dtype=dtype, direction=direction),
        )
        for tokens, vocab in _sizes(device, quick)
        for dtype in dtypes(device, quick=quick)
        for direction in (FORWARD, TRAINING)
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[tuple[int, int]]:
    if device.type != "cuda":
        return [(32, MISTRAL_7B.vocab)] if quick else [(256, MISTRAL_7B.vocab), (64, LLAMA_3_1_8B.vocab)]
    # 4096 tokens: gradients in float64, and what compares them, are to fit into 80 GB
    sizes = [(4096, model.vocab) for model in (LLAMA_3_1_8B, MISTRAL_7B, QWEN3_8B)]
    return sizes[:1] if quick else sizes


def _problem(device: torch.device, *, tokens: int, vocab: int, dtype: torch.dtype, direction: str) -> Problem:
    logits = torch.randn(tokens, vocab, device=device, dtype=dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    loss = torch.empty((), device=device)
    gradients = [logits] if direction == TRAINING else []
    return Problem((logits, labels), _reference, Work.moving(reads=[logits, labels], writes=[loss, *gradients]))


def _reference(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean, a few rows at a time."""
    loss = recomputed(functools.partial(reference.cross_entropy, reduction="sum"))
    parts = zip(torch.split(logits, 1024), torch.split(labels, 1024), strict=True)
    return torch.stack([loss(*part) for part in parts]).sum() / len(labels)
