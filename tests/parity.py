"""Holds an op to the error rule, forward and backward, against the float64 reference and beside PyTorch's own op."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.kernels import cpu
from llama_fast.kernels.launch import INTERPRETED
from llama_fast.kernels.parity import GRADIENT_FACTOR, OUTPUT_FACTOR, error_bound, relative_error
from llama_fast.kernels.triton_compat import HAS_TRITON

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

on_triton = INTERPRETED or torch.cuda.is_available() or cpu.chosen() == "native"
"""Whether all ops run Triton kernels in this process. (Natively they do for LLAMA_FAST_CPU=native; by default some stay PyTorch's.)"""

triton_only = pytest.mark.skipif(not on_triton, reason="the PyTorch path takes this; only the Triton path is tested")
on_cpu = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="float64 is for the CPU, on PyTorch's ops")
not_on_cpu = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="on a CPU, PyTorch's ops take this"
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter would only repeat this, slowly")
compiles_kernels = pytest.mark.skipif(
    INTERPRETED or not HAS_TRITON,
    reason="kernels are compiled by Triton, which is not installed or only interprets here",
)


def assert_parity(
    ours: Callable[..., Any],
    peer: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    *,
    gradients: bool = True,
) -> None:
    """Runs the three on the same inputs and upstream gradients; every output and every gradient must keep the rule.

    Each callable takes the `tensors` in order and returns a tensor or a tuple of tensors. `reference` gets them in
    float64. Floating-point tensors get a gradient each; an output that is not differentiable is compared only.
    """
    expected, expected_gradients = _run(reference, tensors, gradients, torch.float64)
    theirs, their_gradients = _run(peer, tensors, gradients, None)
    actual, actual_gradients = _run(ours, tensors, gradients, None)
    assert len(actual) == len(theirs) == len(expected)
    for i, (a, p, e) in enumerate(zip(actual, theirs, expected, strict=True)):
        _assert_close(f"output {i}", a, p, e, OUTPUT_FACTOR)
    for i, (a, p, e) in enumerate(zip(actual_gradients, their_gradients, expected_gradients, strict=True)):
        if e is None:
            assert a is None, f"gradient of input {i}: got one where the reference has none"
            continue
        assert a is not None, f"gradient of input {i} is missing"
        assert a.dtype == tensors[i].dtype, f"gradient of input {i}: {a.dtype} for a {tensors[i].dtype} input"
        _assert_close(f"gradient of input {i}", a, p, e, GRADIENT_FACTOR)


def _run(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], gradients: bool, dtype: torch.dtype | None
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    leaves = []
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            # .to keeps the strides, so each of the three sees the layout under test
            tensor = tensor.detach().to(dtype or tensor.dtype)
            tensor.requires_grad_(gradients)
        leaves.append(tensor)
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not gradients:
        return outputs, []
    differentiable = [output for output in outputs if output.requires_grad]
    upstream = [_upstream_gradient(output, i) for i, output in enumerate(differentiable)]
    inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(torch.autograd.grad(differentiable, inputs, upstream, allow_unused=True))
    return outputs, [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]


def _upstream_gradient(output: Tensor, seed: int) -> Tensor:
    """The same numbers for every implementation: drawn in float32, rounded to bfloat16 so that every dtype holds them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output.device, output.dtype)


def _assert_close(what: str, actual: Tensor, peer: Tensor, expected: Tensor, factor: float) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == peer.dtype, f"{what}: {actual.dtype}, PyTorch gives {peer.dtype}"
    error, peer_error = relative_error(actual, expected), relative_error(peer, expected)
    bound = error_bound(peer_error, actual.dtype, factor=factor)
    assert error <= bound, f"{what}: relative error {error:.3e}, PyTorch's {peer_error:.3e}, bound {bound:.3e}"


def assert_same_bits(function: Callable[[], Any]) -> None:
    """Two calls must give the same bits."""
    assert_equal_bits(function(), function())


def assert_equal_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Each pair must have the same bits, those of NaNs and zeros included."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        assert torch.equal(a.view(bits), e.view(bits))


class CalledOps(TorchDispatchMode):
    """The names of the ops that run in the block, backward passes included, as in "aten.zeros.default".

    A linear layer of ours that adds no residual is "llama_fast.linear.alone": some CPUs have those instead of PyTorch's.
    """

    def __enter__(self) -> list[str]:
        super().__enter__()
        self.names: list[str] = []
        return self.names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        alone = str(func) == "llama_fast.linear.default" and args[3] is None
        self.names.append("llama_fast.linear.alone" if alone else str(func))
        return func(*args, **kwargs or {})
