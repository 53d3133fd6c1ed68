"""Which implementation CPU tensors get: the Triton kernel, compiled for this CPU (`native/`), or PyTorch's own ops.

By default the faster one that is right, by each op's rule. `LLAMA_FAST_CPU=native` or `pytorch` asks for one of them, and
`use("pytorch")` does inside a `with` block. float64, and kernels that cannot be compiled here, always go to PyTorch.
"""

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from .native.machine import host, why_none
from .triton_compat import HAS_TRITON

if TYPE_CHECKING:
    from torch._ops import OpOverload

CHOICES = ("auto", "native", "pytorch")
_VARIABLE = "LLAMA_FAST_CPU"


def _from_environment() -> str:
    choice = os.environ.get(_VARIABLE, "") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{_VARIABLE} must be native or pytorch, got {choice!r}")
    return choice


_default = _from_environment()
_choice: ContextVar[str] = ContextVar("llama_fast_cpu", default=_default)

REMEMBERED_CALLS = 1024  # of an op: about 4 MB

fallbacks: dict[str, str] = {}
"""Ops that could not be compiled for this CPU, with the reason."""


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Inside, CPU tensors get the implementation `native` or `pytorch`, or the faster one (`auto`).

    Raises `ValueError` for another name, and `RuntimeError` if native kernels are asked for where there are none.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice must be auto, native or pytorch, got {choice!r}")
    if choice == "native" and (reason := why_not_native()):
        raise RuntimeError(f"no native kernels: {reason}")
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def why_not_native() -> str | None:
    """Why Triton kernels do not run natively here; None where they do."""
    if not HAS_TRITON:
        return "Triton, whose front end reads the kernels, is not installed"
    return why_none()


def chosen() -> str:
    """What CPU tensors get here and now: `auto`, `native`, or `pytorch`, which it also is where nothing else is there."""
    choice = _choice.get()
    return "pytorch" if choice == "pytorch" or why_not_native() else choice


def runs_natively(x: torch.Tensor) -> bool:
    """Whether a kernel may be launched on this CPU tensor: native kernels are there, wanted, and know its dtype."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and chosen() != "pytorch"


def products_are_faster(*arguments: Any) -> bool:
    """For ops that are mostly products: PyTorch has them as matrix kernels, and wins where nobody asks for ours by name."""
    return True


def implementation(
    op: "OpOverload",
    kernel: Callable[..., Any],
    pytorch: Callable[..., Any],
    pytorch_is_faster: Callable[..., bool],
) -> Callable[..., Any]:
    """The CPU implementation of `op`: `kernel` launches Triton, `pytorch` does not.

    `pytorch_is_faster` takes the op's arguments; only their shapes, strides and dtypes may be asked.
    """
    if not HAS_TRITON or host() is None:
        return pytorch
    from .native.remembered import overlap, remember
    from .native.tensors import description

    writes = op._schema.is_mutable  # into arguments: then code depends on whether they share memory
    # lse is float64 for all dtypes of attention
    computed_with = [argument.name != "lse" for argument in op._schema.arguments]
    are_tensors = "".join("t" if "Tensor" in str(argument.type) else "." for argument in op._schema.arguments)
    describe = functools.cache(lambda: description("." + are_tensors))
    known: dict[Any, Callable[..., Any]] = {}

    def on_cpu(*arguments: Any) -> Any:
        choice = _choice.get()
        if choice == "pytorch":
            return pytorch(*arguments)
        key = describe()(choice, *arguments)
        if writes and overlap(arguments):
            key = (*key, "overlap")
        call = known.get(key)
        if call is not None:
            return call(*arguments)
        if len(known) >= REMEMBERED_CALLS:
            known.clear()
        wide = _has_float64(itertools.compress(arguments, computed_with))
        if wide or (choice == "auto" and pytorch_is_faster(*arguments)):
            known[key] = pytorch
            return pytorch(*arguments)
        try:
            if writes and overlap(arguments):
                return kernel(*arguments)
            result, call = remember(kernel, arguments)
        except NotImplementedError as error:
            _fall_back(op._schema.name, error)
            known[key] = pytorch
            return pytorch(*arguments)
        if call is kernel and not writes and overlap(arguments):
            return result  # not remembered for these tensors, but it may be for others of these shapes
        known[key] = call
        return result

    return on_cpu


def _has_float64(arguments: Iterable[Any]) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in arguments)


def _fall_back(name: str, error: NotImplementedError) -> None:
    if name not in fallbacks:
        fallbacks[name] = str(error)
        warnings.warn(f"{name} runs on PyTorch's ops: {error}", RuntimeWarning, stacklevel=4)
