"""A kernel launch as a value: run it here, or compile it for a GPU that is not here.

Every `plan_*` function of this package is pure: from tensors (only their shapes, strides and dtypes are read, so meta
tensors do) and a `Gpu` it makes a `LaunchPlan`. The same plan is launched, run in Triton's interpreter, and compiled
ahead of time for inspection; there is no autotuning at call time.
"""

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .native import once
from .triton_compat import triton


@dataclass(frozen=True)
class Gpu:
    """What a plan has to know about a GPU.

    `shared_bytes` is the most that one program may use; `multiprocessors` are SMs, or CUs on AMD.
    """

    arch: str
    multiprocessors: int
    shared_bytes: int
    warp_size: int = 32

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def is_cpu(self) -> bool:
        return self.arch == "cpu"

    @property
    def compute_capability(self) -> int:
        """90 for sm_90; 0 on AMD."""
        return int(self.arch.removeprefix("sm_")) if self.is_nvidia else 0

    @property
    def target(self) -> Any:
        """Triton's `GPUTarget`."""
        if self.is_nvidia:
            return triton.backends.compiler.GPUTarget("cuda", self.compute_capability, self.warp_size)
        return triton.backends.compiler.GPUTarget("hip", self.arch, self.warp_size)

    @property
    def has_pdl(self) -> bool:
        """Whether kernels are launched while the one before still runs (programmatic dependent launch)."""
        return _dependent_launch.get() and self.compute_capability >= 90 and not INTERPRETED


_dependent_launch = ContextVar("dependent_launch", default=True)  # each thread has its own


@contextmanager
def dependent_launch(allowed: bool) -> Iterator[None]:
    """Inside, plans are made with programmatic dependent launch, where the GPU has it, or without: to measure what it gains.

    In this thread alone: another's engine may have other fusions.
    """
    token = _dependent_launch.set(allowed)
    try:
        yield
    finally:
        _dependent_launch.reset(token)


GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm_80", multiprocessors=108, shared_bytes=163 * 1024),  # A100
        Gpu("sm_90", multiprocessors=132, shared_bytes=227 * 1024),  # H100, H200
        Gpu("sm_100", multiprocessors=148, shared_bytes=227 * 1024),  # B200
        Gpu("gfx942", multiprocessors=304, shared_bytes=64 * 1024, warp_size=64),  # MI300X
    )
}

# The interpreter runs programs one after the other at 2 to 3 ms each: as an sm_90 with few multiprocessors, the
# persistent kernels start few programs and still give each of them several rounds of work.
INTERPRETER = Gpu("sm_90", multiprocessors=2, shared_bytes=227 * 1024)

# This computer's CPU to the plans: a multiprocessor for each core, and of its second-level cache what a tile may take.
CPU = Gpu("cpu", multiprocessors=os.cpu_count() or 1, shared_bytes=512 * 1024)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET was set when this package was imported: kernels then run in the interpreter, on the CPU."""


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The `Gpu` behind a torch device; for the CPU the interpreter's, or what native kernels plan with."""
    if device.type == "cpu":
        return INTERPRETER if INTERPRETED else CPU
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Gpu(arch, properties.multi_processor_count, 64 * 1024, properties.warp_size)
    arch = f"sm_{properties.major}{properties.minor}"
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Gpu(arch, properties.multi_processor_count, shared_bytes)


@dataclass(slots=True)  # frozen, it would take 0.5 us more to make
class LaunchPlan:
    """A kernel with everything its launch needs.

    `arguments` are the kernel's run-time parameters by name (tensors, numbers, None), `constants` its constexprs,
    `options` what Triton's compiler takes beside warps and stages (`maxnreg=128`). With `pdl` the kernel may start before
    the one before it has ended, and itself waits for that (`gdc_wait`): only where `Gpu.has_pdl`.
    """

    kernel: Any  # triton.JITFunction, or InterpretedFunction under TRITON_INTERPRET
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    pdl: bool = False

    def __post_init__(self) -> None:
        if self.pdl:
            self.options = self.options | {"launch_pdl": True}

    @property
    def device(self) -> torch.device:
        return next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))

    def launch(self) -> None:
        """Runs the kernel on the device of its tensors, whichever device is current. An empty grid is no launch."""
        if 0 in self.grid:
            return
        device = self.device
        if device.type == "cpu" and not INTERPRETED:
            from .native import compiled

            compiled.launch(self)
        elif device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        # kernel[grid](...) ends here too, 0.5 us later
        self.kernel.run(
            grid=self.grid,
            warmup=False,
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **self.options,
        )

    def compile(self, gpu: Gpu) -> Any:
        """Compiles the kernel for `gpu`, which need not be here. Returns Triton's compiled kernel (`asm`, `metadata`)."""
        assert not INTERPRETED, "kernels defined under TRITON_INTERPRET cannot be compiled"
        with stand_in_driver(gpu):
            return self.kernel.warmup(
                **self.arguments,
                **self.constants,
                grid=self.grid,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                **self.options,
            )


class _StandInDriver:
    """The part of a Triton driver that compiling needs, for a GPU that is not here. To other threads it is the one before."""

    def __init__(self, gpu: Gpu, previous: Any) -> None:
        self._thread, self._previous = threading.get_ident(), previous
        self._answers = dict(
            get_current_target=lambda: gpu.target,
            get_current_device=lambda: gpu.arch,  # the key of the JIT function's cache of binaries
            get_current_stream=lambda device: 0,
        )

    def __getattr__(self, name: str) -> Any:
        if threading.get_ident() != self._thread:
            return getattr(self._previous or triton.runtime.driver.default, name)
        if name not in self._answers:
            raise AttributeError(name)
        return self._answers[name]


@contextmanager
def stand_in_driver(gpu: Gpu) -> Iterator[None]:
    """Inside, this thread compiles for `gpu`. One thread at a time."""
    driver = triton.runtime.driver
    with once.lock:
        previous = driver._active
        driver.set_active(_StandInDriver(gpu, previous))
        try:
            yield
        finally:
            driver._active = previous


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as (rows, size of the last dimension) with contiguous rows: a view where strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def allow_tf32(x: torch.Tensor) -> bool:
    """Whether a product of `x` may be TensorFloat-32: PyTorch's switch for matrix products.

    (Its `allow_tf32` raises once a program has used `fp32_precision`, which knows both.)
    """
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def empty_contiguous(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised, of `x`'s shape. `x.new_empty(x.shape)` takes 0.6 us more on the host."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up. Triton's own function, which also works in kernels, takes 1.4 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, which is positive."""
    return 1 << (n - 1).bit_length()
