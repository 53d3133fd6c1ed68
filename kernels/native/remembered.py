"""Ops that remember: the second call of an op with the same shapes allocates, patches pointers, and launches.

What an op's implementation does on the way to its launches (planning, packing, finding the kernel) follows from the shapes,
strides and dtypes of its tensors and from its numbers alone. So the first call with each of these is watched: which tensors
it allocates, and which launches it makes on which parts of its arguments and of those tensors. Every later call repeats that:

    rms_norm(x, weight)    first     plan, compile or load, launch                      some ms, or 100 ms to compile
                           then      y, rstd = empty...; run(x, weight, y, rstd)        3 us

An implementation that does anything else with PyTorch (a copy to make rows contiguous) is not remembered, and simply runs.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..launch import LaunchPlan
from ..torch_compat import LightDispatchMode, empty_strided_cpu
from .capture import ALLOCATIONS
from .compiled import Compiled, memory_span, recording
from .launch import Fill


def overlap(arguments: Sequence[Any]) -> bool:
    """Whether two of the tensors share memory."""
    spans = sorted(memory_span(arg) for arg in arguments if isinstance(arg, torch.Tensor) and arg.numel())
    return any(begin < end for (_, end), (begin, _) in itertools.pairwise(spans))


def remember(implementation: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Callable[..., Any]]:
    """Runs an implementation, and returns its result with a function that does the same for other tensors like these."""
    watch = _Watch()
    with recording() as launches, watch:
        result = implementation(*arguments)
    if watch.did_more:
        return result, implementation
    if any(kernel.can_fail for kernel, _ in launches):  # then each launch has a record of its own
        return result, implementation
    return result, _replay(watch, launches, arguments, result) or implementation


class _Watch(LightDispatchMode):
    """Sees what an implementation asks of PyTorch. Views are free: their tensors are known by their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[torch.Tensor] = []
        self.did_more = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.allocated.append(result)
        elif not func.is_view:
            self.did_more = True
        return result


def _replay(
    watch: _Watch, launches: list[tuple[Compiled, LaunchPlan]], arguments: Sequence[Any], result: Any
) -> Callable[..., Any] | None:
    """The remembered call; None if a launch used memory that is neither an argument's nor allocated by the call."""
    tensors = [*arguments, *watch.allocated]
    spans = [
        (*memory_span(tensor), number)
        for number, tensor in enumerate(tensors)
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    ]

    def fill(argument: int, tensor: torch.Tensor) -> Fill | None:
        """None also where two arguments share memory and it cannot be told which of them a launch was given."""
        begin, end = memory_span(tensor)
        inside = [(first, number) for first, last, number in spans if first <= begin and end <= last]
        starting = [(first, number) for first, number in inside if first == begin]
        found = starting or inside
        return Fill(argument, found[0][1], begin - found[0][0]) if len(found) == 1 else None

    runs: list[Callable[..., None]] = []
    for kernel, plan in launches:
        values = [plan.arguments[name] for name in kernel.names]
        fills = [
            fill(argument, value)
            for argument, value in enumerate(values)
            if isinstance(value, torch.Tensor) and value.numel()
        ]
        if None in fills:
            return None
        known = [each for each in fills if each is not None]
        runs.append(kernel.launch_of(plan).function(known, tensors=len(tensors)))
    results = result if isinstance(result, tuple) else (result,)
    outputs = [_output(tensor, tensors, len(arguments)) for tensor in results]
    if any(output is None for output in outputs):
        return None
    fresh = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in watch.allocated]
    return _call(fresh, runs, [output for output in outputs if output is not None], isinstance(result, tuple))


@dataclass(frozen=True, slots=True)
class _Output:
    """A result: an allocated tensor, or the view of one."""

    tensor: int
    view: tuple[Any, Any, Any] | None  # shape, strides, storage offset

    def of(self, tensors: list[Any]) -> Any:
        made = tensors[self.tensor]
        return made if self.view is None else made.as_strided(*self.view)


def _output(tensor: torch.Tensor, tensors: list[Any], arguments: int) -> _Output | None:
    """Which allocated tensor a result is, or lies in; None if it lies in none."""
    for number in range(arguments, len(tensors)):
        made = tensors[number]
        if made is tensor or (
            made.numel() and made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        ):
            view = (tensor.shape, tensor.stride(), tensor.storage_offset())
            same = made.dtype == tensor.dtype and (made.shape, made.stride(), made.storage_offset()) == view
            if made.dtype == tensor.dtype:
                return _Output(number, None if same else view)
    return None


def _call(
    fresh: list[tuple[Any, Any, torch.dtype]],
    runs: list[Callable[..., None]],
    outputs: list[_Output],
    is_tuple: bool,
) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        tensors = [*arguments, *[empty_strided_cpu(shape, stride, dtype) for shape, stride, dtype in fresh]]
        for run in runs:
            run(*tensors)
        return tuple([output.of(tensors) for output in outputs]) if is_tuple else outputs[0].of(tensors)

    return call
