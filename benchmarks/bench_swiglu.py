"""SwiGLU and GEGLU: bound by memory. Forward reads gate and up and writes y; backward reads both and dy and writes both gradients."""

import functools

import torch

from llama_fast.benchmarks import peers
from llama_fast.benchmarks.shapes import CPU_125M, LLAMA_3_1_8B, LLAMA_3_1_70B_LAYER, LLAMA_3_2_1B, dtypes
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase, Problem, speed_test
from llama_fast.kernels import reference
from llama_fast.profiler.measure.work import Work

test_speed = speed_test


def cases(device: torch.device, *, quick: bool) -> list[OpCase]:
    """SwiGLU at many sizes, GEGLU at the first."""
    sizes = _sizes(device, quick)
    return [
        OpCase(
            op, f"{tokens} x {width}", dtype, direction, peers.swiglu if op == "swiglu" else peers.geglu,
            functools.partial(_problem, op=op, tokens=tokens, width=width, dtype=dtype, direction=direction),
        )
        for op in ("swiglu", "geglu")
        for tokens, width in (sizes if op == "swiglu" else sizes[:1])
        for dtype in dtypes(device, quick=quick)
        for direction in ((FORWARD,) if quick and op == "geglu" else (FORWARD, TRAINING))
    ]  # fmt: skip


def _sizes(device: torch.device, quick: bool) -> list[tuple[int, int]]:
    if device.type != "cuda":
        return (
            [(128, CPU_125M.intermediate)]
            if quick
            else [(512, CPU_125M.intermediate), (512, LLAMA_3_2_1B.intermediate)]
        )
    width = LLAMA_3_1_8B.intermediate
    sizes = [(8192, width), (2048, width), (8192, LLAMA_3_2_1B.intermediate), (8192, LLAMA_3_1_70B_LAYER.intermediate)]
    return sizes[:1] if quick else sizes


def _problem(device: torch.device, *, op: str, tokens: int, width: int, dtype: torch.dtype, direction: str) -> Problem:
    gate, up = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(2))
    work = Work.moving(reads=[gate, up], writes=[up])
    if direction == TRAINING:
        work += Work.moving(reads=[gate, up, up], writes=[gate, up])
    return Problem((gate, up), reference.swiglu if op == "swiglu" else reference.geglu, work)
