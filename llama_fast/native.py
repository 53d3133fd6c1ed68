"""Anybody's Triton kernel on CPU tensors: compiled for this CPU, run on PyTorch's threads.

    from llama_fast import native

    @triton.jit
    def add(x, y, out, n, BLOCK: tl.constexpr): ...

    native.launch(add, lambda constants: (triton.cdiv(n, constants["BLOCK"]),), x, y, out, n, BLOCK=1024)

The first launch with new constants, dtypes or a new pattern of overlapping tensors compiles (some 100 ms, kept on disk); every
other one is a launch.
"""

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from .kernels import cpu
from .kernels.launch import INTERPRETED, LaunchPlan
from .kernels.native.capture import NotRecordableError, record
from .kernels.native.lowering import UnsupportedOpError
from .kernels.triton_compat import triton

__all__ = ["NotRecordableError", "UnsupportedOpError", "launch", "record", "why_not_native"]

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]

_DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip
_FOR_GPUS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override", "launch_pdl", "waves_per_eu", "matrix_instr_nonkdim"}  # fmt: skip
_TRIALS = 3  # of each configuration that is tuned over


def launch(kernel: Any, grid: Grid, /, *arguments: Any, check_bounds: bool | None = None, **named: Any) -> None:
    """Runs a `@triton.jit` function on CPU tensors: `kernel[grid](*arguments, **named)`, as on a GPU.

    Args:
        kernel: A `@triton.jit` function, also inside `@triton.autotune` and `@triton.heuristics`. Autotuning times each
            configuration on this CPU, once a key, three times each: what it runs then, it runs on the tensors given.
        grid: Up to three numbers of programs, or a function that makes them of a dict of all arguments by name.
        arguments: Tensors on the CPU (float16 to float64, bool, integers), numbers, None, constexprs.
        check_bounds: Whether each access through a pointer is checked against the memory of the tensor it comes from;
            None asks `LLAMA_FAST_CHECK_BOUNDS`, which is 0 or 1. Checked kernels are several times slower.
        named: The rest of the arguments. `debug=True` keeps `tl.device_assert`, as `@triton.jit(debug=True)` and TRITON_DEBUG do;
            what concerns GPUs (`num_warps`, ...) is ignored.

    Raises:
        RuntimeError: There are no native kernels here; it says why. A global constexpr has changed since the kernel was compiled.
        TypeError: Arguments that the kernel does not take, or of a kind that is not compiled; a grid that is none.
        ValueError: A tensor that is not on the CPU; a grid of negative sizes, or of 2**31.
        UnsupportedOpError: The kernel does something that is not compiled for the CPU. It names op, kernel and line.
        AssertionError: A `tl.device_assert` failed; the launch has ended, results are not to be used.
        IndexError: With `check_bounds`: an element outside its tensor was to be read or written, and was not.
    """
    if reason := why_not_native():
        raise RuntimeError(f"no native kernels: {reason}")
    if not hasattr(kernel, "run"):
        raise TypeError(f"kernel must be a function under @triton.jit, got {type(kernel).__name__}")
    _native(kernel, check_bounds).run(*arguments, grid=grid, warmup=False, **named)


def why_not_native() -> str | None:
    """Why kernels cannot be launched here; None where they can."""
    return "TRITON_INTERPRET is set, and kernels belong to the interpreter" if INTERPRETED else cpu.why_not_native()


@functools.cache
def _native(kernel: Any, check_bounds: bool | None) -> Any:
    """What launches `kernel` here: the autotuner and heuristics around it are copies that end in `_Runner`."""
    if isinstance(kernel, triton.JITFunction):
        return _Runner(kernel, check_bounds)
    twin = copy.copy(kernel)
    twin.fn = _native(kernel.fn, check_bounds)
    if isinstance(kernel, triton.runtime.Autotuner):
        twin.cache, twin.do_bench = {}, _milliseconds
    return twin


def _milliseconds(run: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """The least time of a call, in ms, for each quantile that Triton's autotuner asks for. The first call compiles."""
    run()
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return [min(times) * 1e3] * len(quantiles)


class _Runner:
    """A kernel whose `run` launches it on the CPU."""

    def __init__(self, kernel: Any, check_bounds: bool | None) -> None:
        self.kernel, self.check_bounds = kernel, check_bounds
        self.constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}

    def run(self, *arguments: Any, grid: Grid, warmup: bool, **named: Any) -> None:
        from .kernels.native import compiled

        options = {name: named.pop(name) for name in ("debug",) if name in named and name not in self.kernel.arg_names}
        bound = self.bind(arguments, named)
        plan = LaunchPlan(
            self.kernel,
            _sizes(self.kernel.__name__, grid, bound),
            {name: value for name, value in bound.items() if name not in self.constexprs},
            {name: value for name, value in bound.items() if name in self.constexprs},
            options=options,
        )
        for name, value in plan.arguments.items():
            _check(self.kernel.__name__, name, value)
        if 0 not in plan.grid:
            compiled.launch(plan, check_bounds=self.check_bounds)

    def bind(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        named = {name: value for name, value in named.items() if name in self.kernel.arg_names or name not in _FOR_GPUS}
        try:
            bound = self.kernel.signature.bind(*arguments, **named)
        except TypeError as error:
            unknown = [repr(name) for name in named if name not in self.kernel.arg_names]
            names = ", ".join(self.kernel.arg_names)
            reason = f"there is no argument {', '.join(unknown)}, only {names}" if unknown else str(error)
            raise TypeError(f"{self.kernel.__name__}: {reason}") from None
        bound.apply_defaults()
        return dict(bound.arguments)


def _sizes(kernel: str, grid: Grid, bound: dict[str, Any]) -> tuple[int, ...]:
    sizes = grid(bound) if callable(grid) else grid
    if not isinstance(sizes, tuple | list) or not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) for n in sizes):
        made = "makes" if callable(grid) else "is"
        raise TypeError(f"{kernel}: grid must be one to three ints or a function that makes them, and {made} {sizes!r}")
    if not all(0 <= size < 2**31 for size in sizes):
        raise ValueError(f"{kernel}: grid must be of numbers from 0 to 2**31 - 1, and is {tuple(sizes)}")
    return tuple(sizes)


def _check(kernel: str, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{kernel}: {name} must be on the CPU, and is on {value.device}")
        if value.dtype not in _DTYPES:
            raise TypeError(f"{kernel}: {name} is of {value.dtype}, which is not compiled for the CPU")
        if value.layout != torch.strided:
            raise TypeError(f"{kernel}: {name} must be a dense tensor, and is {value.layout}")
        if value.is_neg():
            raise TypeError(f"{kernel}: {name} is negated when it is read: pass {name}.resolve_neg()")
    elif value is not None and not isinstance(value, int | float):
        raise TypeError(f"{kernel}: {name} must be a tensor, a number or None, and is of type {type(value).__name__}")
