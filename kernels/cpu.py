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

from .native import machine
from .native.llvmlite_compat import has_llvmlite
from .torch_compat import are_of_plain_types, is_plain_on_cpu
from .triton_compat import HAS_TRITON
from .variables import EnvironmentVariableError, bounds_asked_for

if TYPE_CHECKING:
    from torch._ops import OpOverload

CHOICES = ("auto", "native", "pytorch")
_VARIABLE = "LLAMA_FAST_CPU"


def _from_environment() -> str:
    choice = os.environ.get(_VARIABLE, "") or "auto"
    if choice not in CHOICES:
        raise EnvironmentVariableError(f"{_VARIABLE} must be native or pytorch, got {choice!r}")
    return choice


_default = _from_environment()
bounds_asked_for()  # raises now and not at the first kernel; so does the next
if os.environ.get(machine.VARIABLE):
    machine.host()
_choice: ContextVar[str] = ContextVar("llama_fast_cpu", default=_default)

REMEMBERED_CALLS = 1024  # of an op: about 4 MB

fallbacks: dict[str, str] = {}
"""Ops that could not be compiled for this CPU, with the reason."""


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Inside, CPU tensors get the implementation `native` or `pytorch`, or the faster one (`auto`).

    In this thread alone. Raises `ValueError` for another name, and `RuntimeError` if native kernels are asked for where there are none.
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


_RECORDED = "recorded"  # natively and anew at every call, for whoever lists the launches (native/capture.py)


@contextmanager
def recorded_by_name() -> Iterator[None]:
    """Inside, ops launch their kernels natively, and one that did anything else raises `NotRecordableError`."""
    token = _choice.set(_RECORDED)
    try:
        yield
    finally:
        _choice.reset(token)


def why_not_native() -> str | None:
    """Why Triton kernels do not run natively here; None where they do."""
    if not HAS_TRITON:
        return "Triton, whose front end reads the kernels, is not installed"
    if reason := machine.why_none():
        return reason
    from .native.tensors import why_unreadable

    return why_unreadable()


def chosen() -> str:
    """What CPU tensors get here and now: `auto`, `native`, or `pytorch`, which it also is where nothing else is there."""
    choice = _choice.get()
    return "pytorch" if choice == "pytorch" or why_not_native() else choice


def runs_natively(x: torch.Tensor) -> bool:
    """Whether a kernel may be launched on this CPU tensor: native kernels are there, wanted, and know its dtype."""
    return x.device.type == "cpu" and x.dtype != torch.float64 and chosen() != "pytorch"


def has_large_products(dtype: torch.dtype) -> bool:
    """Whether large products of this dtype are our kernels' on this CPU, and not oneDNN's: those of bfloat16 where it multiplies
    float32 faster. oneDNN takes them as they are: 165 GFLOP/s on two cores, ours 270."""
    if dtype != torch.bfloat16 or chosen() == "pytorch":
        return False
    here = machine.host()
    return here is not None and here.prefers_float32 and not here.has_bf16_tiles


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies it: float16, and bfloat16 on older CPUs, native kernels must convert to float32 first."""
    if dtype == torch.bfloat16:
        here = machine.host()
        return here is not None and here.has_bf16_products
    return dtype == torch.float32


def has_fast_mkl() -> bool:
    """Whether MKL multiplies few rows of float32 by a small weight in less time than our kernels: not on an AMD CPU. On two cores of an EPYC
    (Zen 4), weights in turns, it took 1.5 to 5.7 times as long for 1 to 16 rows and weights of 128 x 128 to 2304 x 768."""
    here = machine.host()
    return here is None or not here.cpu.startswith("znver")


def converts(x: torch.Tensor, *arguments: Any) -> bool:
    """For products that are faster natively where nothing has to be converted."""
    return not multiplies(x.dtype)


def implementation(
    op: "OpOverload",
    kernel: Callable[..., Any],
    pytorch: Callable[..., Any],
    pytorch_is_faster: Callable[..., bool],
    check: Callable[..., None] | None,
) -> Callable[..., Any]:
    """The CPU implementation of `op`: `kernel` launches Triton, `pytorch` does not.

    `pytorch_is_faster` takes the op's arguments; only their shapes, strides and dtypes may be asked. `check` takes them at
    every call, and looks at their values.
    """
    if not HAS_TRITON or not has_llvmlite():
        return checked(check, pytorch)
    return Implementation(op, kernel, pytorch, pytorch_is_faster, check)


def checked(check: Callable[..., None] | None, implementation: Callable[..., Any]) -> Callable[..., Any]:
    if check is None:
        return implementation

    def check_and_do(*arguments: Any) -> Any:
        check(*arguments)
        return implementation(*arguments)

    return check_and_do


class Implementation:
    """Of an op with native kernels: it does as it is asked to, or what is faster, and remembers calls (`native/remembered.py`)."""

    def __init__(
        self,
        op: "OpOverload",
        kernel: Callable[..., Any],
        pytorch: Callable[..., Any],
        pytorch_is_faster: Callable[..., bool],
        check: Callable[..., None] | None,
    ) -> None:
        self._name, self._check = op._schema.name, check
        self._kernel, self._pytorch, self._pytorch_is_faster = kernel, pytorch, pytorch_is_faster
        # into arguments: then code depends on whether others share their memory
        self._written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]
        self._extents: dict[Any, list[int]] = {}  # bytes that each argument spans, by key: they follow from it
        # lse is float64 for all dtypes of attention
        self._computed_with = [argument.name != "lse" for argument in op._schema.arguments]
        self._kinds = "." + "".join("t" if "Tensor" in str(argument.type) else "." for argument in op._schema.arguments)
        self._known: dict[Any, Callable[..., Any]] = {}
        # those of tensors that nothing but the dispatcher and this looks at, with the check
        self._plain: dict[Any, Callable[..., Any]] = {}

    @functools.cached_property
    def _describe(self) -> Callable[..., tuple[Any, ...] | None]:
        if why_not_native():
            return lambda *arguments: None  # all calls go to PyTorch

        from .native.tensors import description

        return description(self._kinds)

    def known_call(self, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """What the dispatcher would find for these arguments, if it has found it before. It writes into none of them."""
        if not are_of_plain_types(arguments):
            return None
        try:
            key = self._describe(_choice.get(), *arguments)
        except (RuntimeError, TypeError):  # a layout without strides, a number where a tensor belongs: others say so
            return None
        return None if key is None else self._plain.get(key)

    def __call__(self, *arguments: Any) -> Any:
        if self._check is not None:
            self._check(*arguments)
        choice = _choice.get()
        if choice == "pytorch":
            return self._pytorch(*arguments)
        if choice == _RECORDED:
            return self._record(arguments)
        key = self._describe(choice, *arguments)
        if key is None:
            return self._pytorch(*arguments)
        if self._written and self._writes_over_others(key, arguments):
            key = (*key, "overlap")
        call = self._known.get(key)
        return call(*arguments) if call is not None else self._first_call(choice, key, arguments)

    def _first_call(self, choice: str, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
        from .native.compiled import recording
        from .native.remembered import remember

        if len(self._known) >= REMEMBERED_CALLS:
            self._known.clear()
            self._plain.clear()
            self._extents.clear()
        wide = _has_float64(itertools.compress(arguments, self._computed_with))
        if wide or (choice == "auto" and self._pytorch_is_faster(*arguments)):
            return self._know(key, arguments, self._pytorch)(*arguments)
        try:
            if self._written:
                with recording(run=False):  # all its kernels are compiled before one of them writes
                    self._kernel(*arguments)
                if "overlap" in key:
                    return self._kernel(*arguments)
            result, call = remember(self._kernel, arguments)
        except NotImplementedError as error:
            _fall_back(self._name, error)
            return self._know(key, arguments, self._without_kernels)(*arguments)
        if call is self._kernel and _overlap(arguments):
            return result  # not remembered for these tensors, but it may be for others of these shapes
        self._know(key, arguments, call)
        return result

    def _without_kernels(self, *arguments: Any) -> Any:
        """Where one of its kernels cannot be compiled: what `pytorch` would have multiplied natively, it does not now."""
        with use("pytorch"):
            return self._pytorch(*arguments)

    def _record(self, arguments: tuple[Any, ...]) -> Any:
        from .native.capture import NotRecordableError, OnlyLaunches

        if why_not_native() or _has_float64(itertools.compress(arguments, self._computed_with)):
            raise NotRecordableError(f"{self._name} launches no native kernel: {why_not_native() or 'it is float64'}")
        try:
            with OnlyLaunches():
                return self._kernel(*arguments)
        except NotImplementedError as error:
            _fall_back(self._name, error)
            raise NotRecordableError(f"{self._name} runs on PyTorch's ops: {error}") from error

    def _writes_over_others(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> bool:
        """Whether an argument that is written into shares memory with another one: 3 us, and 20 with shapes and strides."""
        extents = self._extents.get(key)
        if extents is None:
            extents = self._extents[key] = [_extent(argument) for argument in arguments]
        begins = [x.data_ptr() if extent else 0 for x, extent in zip(arguments, extents, strict=True)]
        for i in self._written:
            begin = begins[i]
            end = begin + extents[i]
            for j, other in enumerate(begins):
                if other < end and begin < other + extents[j] and j != i:
                    return True
        return False

    def _know(self, key: tuple[Any, ...], arguments: tuple[Any, ...], call: Callable[..., Any]) -> Callable[..., Any]:
        self._known[key] = call
        tensors = (argument for argument in arguments if isinstance(argument, torch.Tensor))
        if not self._written and all(map(is_plain_on_cpu, tensors)):
            self._plain[key] = checked(self._check, call)
        return call


def _overlap(arguments: tuple[Any, ...]) -> bool:
    from .native.remembered import overlap

    return overlap(arguments)


def _extent(argument: Any) -> int:
    from .native.compiled import memory_span

    if not isinstance(argument, torch.Tensor) or not argument.numel():
        return 0
    begin, end = memory_span(argument)
    return end - begin


def _has_float64(arguments: Iterable[Any]) -> bool:
    return any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float64 for arg in arguments)


def _fall_back(name: str, error: NotImplementedError) -> None:
    if name not in fallbacks:
        fallbacks[name] = str(error)
        warnings.warn(f"{name} runs on PyTorch's ops: {error}", RuntimeWarning, stacklevel=5)
