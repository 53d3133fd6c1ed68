"""A plan's kernel as machine code: found in memory, else on disk, else compiled; and launched on the plan's tensors.

    launch(plan)          what `plan.launch()` does for CPU tensors
    compiled(plan)        the kernel, and how its arguments are called

Machine code is made for a kernel's source, its constants, the types of its arguments, and which of its tensors share memory:
where one that is written overlaps another, what was loaded before must be kept (`lowering/analysis.py`).
"""

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..launch import LaunchPlan
from . import cache, codegen
from .launch import Kernel, Launch
from .lowering import lower
from .machine import Machine, host, why_none
from .threads import threads_for
from .ttir import Specialization, parse

_LETTERS = {"fp32": "f", "fp64": "d"}
PRODUCTS_PER_BYTE = (
    32  # what a tile's product does for each byte it reads; an eighth of its FLOPs counts as a byte moved
)


@dataclass(frozen=True)
class Compiled:
    """A kernel's code and the names of its run-time arguments. `has_products`: it does more than move bytes."""

    kernel: Kernel
    names: tuple[str, ...]
    has_products: bool

    def launch_of(self, plan: LaunchPlan) -> Launch:
        """A launch of the kernel on the plan's tensors, with as many threads as it has work for."""
        arguments = [plan.arguments[name] for name in self.names]
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        tensors = {tensor.data_ptr(): tensor for tensor in arguments if isinstance(tensor, torch.Tensor)}
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        programs = functools.reduce(int.__mul__, plan.grid, 1)
        threads = threads_for(programs, moved * (PRODUCTS_PER_BYTE if self.has_products else 1))
        return Launch(self.kernel, plan.grid, values, threads)


def launch(plan: LaunchPlan) -> None:
    """Runs a plan whose tensors are on the CPU."""
    kernel = compiled(plan)
    if (recorded := getattr(_local, "recorded", None)) is not None:
        recorded.append((kernel, plan))
    kernel.launch_of(plan).function()()


def compiled(plan: LaunchPlan) -> Compiled:
    """The machine code of a plan's kernel for this computer.

    Raises `RuntimeError` where there is none, and `UnsupportedOpError` for a kernel that cannot be compiled.
    """
    machine = host()
    if machine is None:
        raise RuntimeError(f"no native kernels: {why_none()}")
    aliases = shared_memory(plan)
    key = (machine, plan.kernel, tuple(_kinds(plan)), tuple(sorted(plan.constants.items())), aliases)
    with _lock:
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = _load_or_compile(plan, aliases, machine)
    return found


_compiled: dict[Any, Compiled] = {}
_lock = threading.RLock()
_local = threading.local()


@contextmanager
def recording() -> Iterator[list[tuple[Compiled, LaunchPlan]]]:
    """Inside, this thread's launches are listed as they are made."""
    launches: list[tuple[Compiled, LaunchPlan]] = []
    before, _local.recorded = getattr(_local, "recorded", None), launches
    try:
        yield launches
    finally:
        _local.recorded = before


def _kinds(plan: LaunchPlan) -> Iterator[Any]:
    """What Triton's specialisation, and so the code, follows from in each argument; coarser only where it cannot matter."""
    for value in plan.arguments.values():
        if isinstance(value, torch.Tensor):
            yield value.dtype
        elif isinstance(value, int) and not isinstance(value, bool):
            yield 1 if value == 1 else -1 if -(2**31) <= value < 2**31 else -2
        else:
            yield None if value is None else type(value)


def shared_memory(plan: LaunchPlan) -> tuple[tuple[str, str], ...]:
    """Pairs of tensor arguments of a plan that overlap in memory, by name."""
    spans = sorted(
        (*memory_span(value), name)
        for name, value in plan.arguments.items()
        if isinstance(value, torch.Tensor) and value.numel()
    )
    pairs = []
    for i, (_, end, name) in enumerate(spans):
        for begin, _, other in spans[i + 1 :]:
            if begin >= end:
                break
            pairs.append((name, other))
    return tuple(sorted(pairs))


def memory_span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor, which has elements, to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _load_or_compile(plan: LaunchPlan, pairs: tuple[tuple[str, str], ...], machine: Machine) -> Compiled:
    specialization = Specialization(plan)
    names = [name for name, _ in specialization.arguments]
    classes = _classes(names, pairs)
    name = str(plan.kernel.__name__)
    key = "\n".join((specialization.key, repr(sorted(classes.items())), _own_version()))
    code, facts = codegen.cached(key, name, machine), cache.read(key + "\nfacts")
    if code is None or facts is None:
        text = specialization.ttir()
        function = parse(text)
        ir = lower(function, classes, machine)
        code = codegen.compile_module(ir, name, machine, key=key, ttir=text)
        facts = json.dumps(dict(has_products=any(op.kind == "tt.dot" for op in function.ops()))).encode()
        cache.write(key + "\nfacts", facts)
    letters = "".join(_LETTERS.get(kind, "q") for _, kind in specialization.arguments)
    return Compiled(Kernel(code, letters), tuple(names), json.loads(facts)["has_products"])


def _classes(names: list[str], pairs: tuple[tuple[str, str], ...]) -> dict[int, int]:
    """The number of each argument that shares memory with an earlier one, with the first such argument's."""
    classes: dict[int, int] = {}
    for left, right in pairs:
        if left in names and right in names:
            i, j = sorted((names.index(left), names.index(right)))
            classes[j] = classes.get(i, i)
    return classes


@functools.cache
def _own_version() -> str:
    """Of the code that makes code: a change in it makes all objects on disk stale."""
    here = Path(__file__).parent
    files = sorted([here / "ttir.py", *(here / "lowering").glob("*.py"), *(here / "math").glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
