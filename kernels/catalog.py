"""Every op with its plans at LLaMA sizes: what `llama-fast inspect` and the tests compile ahead of time."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from .binary import inspect_plan
from .launch import CPU, Gpu, LaunchPlan
from .native.machine import Machine

OPS: dict[str, ModuleType] = {
    name: import_module(f".{name}", __package__)
    for name in (
        "attention",
        "attention_decode",
        "cross_entropy",
        "embedding",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "norm_heads",
        "norm_qkv_rope",
        "norm_swiglu",
        "rms_norm",
        "rope",
        "rope_append",
        "rotary_angles",
        "sampling",
        "softmax",
        "swiglu",
    )
}
"""The files that have `example_plans`, by the op's name."""


@dataclass(frozen=True)
class Example:
    """A plan at a size that a LLaMA has."""

    op: str
    shape: str
    plan: LaunchPlan

    @property
    def kernel(self) -> str:
        return str(self.plan.kernel.__name__)

    @property
    def dtype(self) -> str:
        tensors = (value for value in self.plan.arguments.values() if isinstance(value, torch.Tensor))
        return str(next(tensors).dtype).removeprefix("torch.")


def examples(op: str, target: Gpu | Machine) -> Iterator[Example]:
    """The plans of `op` for a GPU, or a CPU."""
    for shape, plan in OPS[op].example_plans(target if isinstance(target, Gpu) else CPU):
        yield Example(op, shape, plan)


def inspect_example(example: Example, target: Gpu | Machine) -> dict[str, object]:
    """One row of `llama-fast inspect`: the example and what its binary holds."""
    arch = target.arch if isinstance(target, Gpu) else target.name
    row = dict(op=example.op, kernel=example.kernel, gpu=arch, shape=example.shape, dtype=example.dtype)
    if isinstance(target, Gpu):
        return row | vars(inspect_plan(example.plan, target))
    from .native import inspection

    return row | vars(inspection.inspect_plan(example.plan, target))
