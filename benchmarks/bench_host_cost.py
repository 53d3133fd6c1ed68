"""What a call of each op costs the host: checks, dispatch and planning, with the launch itself replaced by nothing.

It needs no GPU. CPU tensors take the Triton path under TRITON_INTERPRET=1, and as no kernel runs, the interpreter costs nothing:

    TRITON_INTERPRET=1 pytest benchmarks/bench_host_cost.py --benchmark-columns=min,median,iqr,rounds

On a GPU the same runs without that variable. The goals are 10 us a call in inference and 25 us in training. Not counted
is Triton's own launch, nor what PyTorch's autograd engine takes beside the op in the backward rows, which have no goal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast import ops
from llama_fast.kernels.launch import INTERPRETED, LaunchPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

INFERENCE_GOAL_US = 10.0
TRAINING_GOAL_US = 25.0

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not INTERPRETED, reason="CPU tensors take PyTorch's ops: set TRITON_INTERPRET=1"
    ),
    pytest.mark.benchmark(max_time=0.3, disable_gc=True, warmup=True),
]


@dataclass(frozen=True)
class Case:
    """A call of `ops.<op>` on tensors so small that nothing but the host counts."""

    op: str
    inputs: tuple[Tensor | None, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "+".join([self.op, *self.options])

    def __call__(self) -> Any:
        return getattr(ops, self.op)(*self.inputs, **self.options)

    @property
    def differentiable(self) -> list[Tensor]:
        tensors = [x for x in (*self.inputs, *self.options.values()) if isinstance(x, Tensor)]
        return [x for x in tensors if x.is_floating_point()]

    def requiring_grad(self) -> "Case":
        def leaf(x: Any) -> Any:
            is_floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.detach().clone().requires_grad_() if is_floating else x

        return Case(self.op, tuple(map(leaf, self.inputs)), {name: leaf(x) for name, x in self.options.items()})


def _cases() -> Iterator[Case]:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=DEVICE, dtype=torch.bfloat16)

    x, weight = ones(2, 4, 64), ones(64)  # (batch, seq, hidden)
    yield Case("rms_norm", (x, weight))
    yield Case("rms_norm", (x, weight), dict(residual=x))
    yield Case("layer_norm", (x, weight, weight))
    yield Case("layer_norm", (x, weight, weight), dict(residual=x))
    yield Case("softmax", (x,))
    yield Case("swiglu", (x, x))
    yield Case("geglu", (x, x))

    matrix, labels = ones(64, 64), torch.ones(2, 4, device=DEVICE, dtype=torch.int64)
    yield Case("linear", (x, matrix))
    yield Case("linear", (x, matrix, weight), dict(activation="silu", residual=x))
    yield Case("cross_entropy", (x, labels))
    yield Case("linear_cross_entropy", (x, matrix, labels))

    q, k = ones(2, 4, 4, 64), ones(2, 2, 4, 64)  # (batch, heads, seq, head_dim)
    yield Case("rope", (q, k, ones(4, 64), ones(4, 64)))

    yield Case("attention", (q, k, k))
    lens, table = torch.ones(2, device=DEVICE, dtype=torch.int32), torch.zeros(2, 4, device=DEVICE, dtype=torch.int32)
    yield Case("attention_decode", (q[:, :, :1], ones(2, 2, 256, 64), ones(2, 2, 256, 64), lens))
    yield Case("attention_decode", (q[:, :, :1], ones(8, 2, 64, 64), ones(8, 2, 64, 64), lens), dict(block_table=table))

    rows, slots, cache = ones(2, 64), torch.arange(2, device=DEVICE), ones(8, 2, 64, 64)
    yield Case("norm_qkv_rope", (rows, weight, ones(8 * 64, 64), None, ones(2, 64), ones(2, 64), cache, cache, slots),
               dict(eps=1e-5, heads=4))  # fmt: skip
    yield Case("norm_swiglu", (rows, weight, matrix), dict(eps=1e-5))


CASES = [case for case in _cases() if case.op in ops.__all__]
NOT_DIFFERENTIABLE = {"attention_decode", "norm_qkv_rope", "norm_swiglu"}
TRAINING_CASES = [case for case in CASES if case.op not in NOT_DIFFERENTIABLE]


@pytest.fixture(autouse=True)
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LaunchPlan, "launch", lambda plan: None)


def _measure(benchmark: Any, function: Callable[[], Any], group: str, goal_us: float | None) -> None:
    benchmark.group = group if goal_us is None else f"{group}, goal {goal_us:.0f} us"
    benchmark(function)
    median_us = benchmark.stats.stats.median * 1e6
    benchmark.extra_info.update(goal_us=goal_us, within_goal=None if goal_us is None else median_us <= goal_us)


def test_every_op_is_measured() -> None:
    assert {case.op for case in CASES} == set(ops.__all__)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference(benchmark: Any, case: Case, mode: Callable[[], Any]) -> None:
    with mode():
        _measure(benchmark, case, mode.__name__, INFERENCE_GOAL_US)


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_training_forward(benchmark: Any, case: Case) -> None:
    _measure(benchmark, case.requiring_grad(), "training, forward", TRAINING_GOAL_US)


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_training_backward(benchmark: Any, case: Case) -> None:
    case = case.requiring_grad()
    outputs = case()
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    gradients = [torch.ones_like(y) for y in outputs]
    inputs = case.differentiable
    _measure(
        benchmark,
        lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True),
        "training, backward and the autograd engine",
        None,
    )
