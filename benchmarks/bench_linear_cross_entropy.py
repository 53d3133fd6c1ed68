"""A head and its loss: bound by arithmetic. One product forward, two backward; the logits need not leave the chip."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import CPU_125M, LLAMA_3_1_8B, LLAMA_3_2_1B, MISTRAL_7B, ModelShape, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, recomputed, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """The heads of models, one micro-batch of tokens."""
    return [
        OpCase(
            "linear_cross_entropy", f"{model.name}, {tokens} tokens", dtype, direction,
            functools.partial(peers.linear_cross_entropy, tune=model == LLAMA_3_1_8B),
            functools.partial(_problem, model=model, tokens=tokens, dtype=dtype, direction=direction),
        )
        for model, tokens in _sizes(device, quick)
        for dtype in dtypes(device, quick=quick)
        for direction in (FORWARD, TRAINING)
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[tuple[ModelShape, int]]:
    if device.type != "cuda":
        return [(replace(CPU_125M, name="125M, 4000 classes", vocab=4000), 32)] if quick else [(CPU_125M, 128)]
    sizes = [(LLAMA_3_1_8B, 8192), (LLAMA_3_2_1B, 8192), (MISTRAL_7B, 8192)]
    return sizes[:1] if quick else sizes


def _problem(device: torch.device, *, model: ModelShape, tokens: int, dtype: torch.dtype, direction: str) -> Problem:
    hidden = torch.randn(tokens, model.hidden, device=device, dtype=dtype)
    weight = torch.randn(model.vocab, model.hidden, device=device, dtype=dtype) * model.hidden**-0.5
    labels = torch.randint(model.vocab, (tokens,), device=device)
    loss = torch.empty((), device=device)
    gradients, products = ([hidden, weight], 3) if direction == TRAINING else ([], 1)
    flops = products * 2 * tokens * weight.numel()
    work = Work.moving(reads=[hidden, weight, labels], writes=[loss, *gradients], flops=flops)
    return Problem((hidden, weight, labels), _reference, work)


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mean, a few tokens at a time."""
    loss = recomputed(functools.partial(reference.linear_cross_entropy, reduction="sum"))
    parts = zip(torch.split(hidden, 1024), torch.split(labels, 1024), strict=True)
    return torch.stack([loss(rows, weight, wanted) for rows, wanted in parts]).sum() / len(labels)
