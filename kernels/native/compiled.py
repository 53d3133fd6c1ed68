"""A plan's kernel as machine code: found in memory, else on disk, else compiled; and launched on the plan's tensors.

    launch(plan)          what `plan.launch()` does for CPU tensors
    compiled(plan)        the kernel, and how its arguments are called

Machine code is made for a kernel's source, its constants, the types of its arguments, and which of its tensors share memory:
where one that is written overlaps another, what was loaded before must be kept (`lowering/analysis.py`). A kernel without
products has code of its own for tensors that no cache holds (`large_tensors`).
"""

import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..launch import LaunchPlan
from ..variables import bounds_asked_for
from . import cache, codegen, failures
from .front_end import Specialization, keeps_asserts, require_same_globals
from .launch import Kernel, Launch
from .lowering import can_fail, lower
from .machine import Machine, cache_bytes, host, why_none
from .once import lock
from .threads import threads_for
from .ttir import UnsupportedOpError, parse

_LETTERS = {"fp32": "f", "fp64": "d"}
PRODUCTS_PER_BYTE = 32
"""What a tile's product does for each byte that it reads; an eighth of its FLOPs counts as a byte moved."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's code and the names of its run-time arguments. `has_products`: it does more than move bytes.

    One that `can_fail` has a record of failures behind its arguments, and where it `checks_bounds` the tensors' memory.
    """

    kernel: Kernel
    names: tuple[str, ...]
    has_products: bool
    can_fail: bool = False
    checks_bounds: bool = False

    def run(self, plan: LaunchPlan) -> None:
        """Launches, and raises what failed in the kernel."""
        if not self.can_fail:
            return self.launch_of(plan).function()()
        record = failures.Record()
        tensors = [plan.arguments[name] for name in self.names]
        spans = [
            memory_span(value) if value.numel() else (0, 0)
            for value in tensors
            if self.checks_bounds and isinstance(value, torch.Tensor)
        ]
        self.launch_of(plan, [record.address, *itertools.chain(*spans)]).function()()
        return record.raise_failure(plan)

    def launch_of(self, plan: LaunchPlan, more: Sequence[int] = (), *, in_region: bool = False) -> Launch:
        """A launch of the kernel on the plan's tensors, with as many threads as it has work for (`threads_for`)."""
        arguments = [plan.arguments[name] for name in self.names]
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else _signed(value) for value in arguments]
        tensors = {tensor.data_ptr(): tensor for tensor in arguments if isinstance(tensor, torch.Tensor)}
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        programs = functools.reduce(int.__mul__, plan.grid, 1)
        work = moved * (PRODUCTS_PER_BYTE if self.has_products else 1)
        threads = threads_for(programs, work, in_region=in_region)
        return Launch(self.kernel, plan.grid, [*values, *more], threads)


def _signed(x: float) -> float:
    """An integer of 64 bits without a sign as one with it, which a slot takes."""
    return x - (1 << 64) if x >= 1 << 63 and isinstance(x, int) else x


def launch(plan: LaunchPlan, *, check_bounds: bool | None = None) -> None:
    """Runs a plan whose tensors are on the CPU. `check_bounds`: as `LLAMA_FAST_CHECK_BOUNDS` says where it is None.

    Raises `AssertionError` and `IndexError` for what failed in the kernel.
    """
    kernel = compiled(plan, bounds_asked_for() if check_bounds is None else check_bounds)
    if _recorder.launches is not None:
        _recorder.launches.append((kernel, plan))
    if _recorder.run:
        kernel.run(plan)


def compiled(plan: LaunchPlan, check_bounds: bool = False) -> Compiled:
    """The machine code of a plan's kernel for this computer.

    Raises `RuntimeError` where there is none, and where a global of the kernel has changed; `UnsupportedOpError` for a kernel
    that cannot be compiled.
    """
    machine = host()
    if machine is None:
        raise RuntimeError(f"no native kernels: {why_none()}")
    require_same_globals(plan.kernel)  # before something is kept on disk that was compiled with others
    aliases = shared_memory(plan)
    key = (
        machine,
        plan.kernel,
        tuple(_kinds(plan)),
        tuple(_constants(plan)),
        aliases,
        check_bounds,
        keeps_asserts(plan),
    )

    def code(large: tuple[str, ...]) -> Compiled:
        found = _compiled.get((key, large))
        if found is None:
            found = _compiled[key, large] = _load_or_compile(plan, aliases, machine, check_bounds, large)
        return found

    with lock:
        found = code(())
        large = () if found.has_products else large_tensors(plan)
        return code(large) if large else found


_compiled: dict[Any, Compiled] = {}


class _Recorder(threading.local):
    launches: "list[tuple[Compiled, LaunchPlan]] | None" = None
    run = True


_recorder = _Recorder()


@contextmanager
def recording(*, run: bool = True) -> Iterator[list[tuple[Compiled, LaunchPlan]]]:
    """Inside, this thread's launches are listed as they are made; with `run=False` their kernels are compiled, and not run."""
    launches: list[tuple[Compiled, LaunchPlan]] = []
    before = _recorder.launches, _recorder.run
    _recorder.launches, _recorder.run = launches, run
    try:
        yield launches
    finally:
        _recorder.launches, _recorder.run = before


def _kinds(plan: LaunchPlan) -> Iterator[Any]:
    """What Triton's specialisation, and so the code, follows from in each argument; coarser only where it cannot matter."""
    for value in plan.arguments.values():
        if isinstance(value, torch.Tensor):
            yield value.dtype
        elif isinstance(value, int) and not isinstance(value, bool):
            yield 1 if value == 1 else -1 if -(2**31) <= value < 2**31 else -2 if value < 2**63 else -3
        else:
            yield None if value is None else type(value)


def _constants(plan: LaunchPlan) -> Iterator[Any]:
    """With their types: 1, 1.0 and True are equal, and not the same to a kernel. NaN is the same as NaN."""
    for name, value in sorted(plan.constants.items(), key=lambda item: item[0]):
        yield name, type(value), repr(value) if isinstance(value, float) else value


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
    begin = tensor.data_ptr()
    if tensor.is_contiguous():  # a call that is made for the first time asks this 20 times, of 3 us
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def large_tensors(plan: LaunchPlan) -> tuple[str, ...]:
    """The arguments of a launch that take an eighth of the last cache each, where all of them together take a third of it.

    Whoever reads one of them later finds little of it there, so what is written into it goes to memory at once (`memory.py`). A norm
    and a softmax of what it gave took 588 us so, and 525 through the cache, where the norm moved a quarter of it; 1737 and 2142
    where it moved half.
    """
    sizes = {name: x.numel() * x.element_size() for name, x in plan.arguments.items() if isinstance(x, torch.Tensor)}
    if 3 * sum(sizes.values()) < cache_bytes():
        return ()
    return tuple(sorted(name for name, size in sizes.items() if 8 * size >= cache_bytes()))


def _load_or_compile(
    plan: LaunchPlan, pairs: tuple[tuple[str, str], ...], machine: Machine, check_bounds: bool, large: tuple[str, ...]
) -> Compiled:
    specialization = Specialization(plan)
    names = [name for name, _ in specialization.arguments]
    classes = _classes(names, pairs)
    name = str(plan.kernel.__name__)
    numbers = frozenset(number for number, argument in enumerate(names) if argument in large)
    options = f"check_bounds={check_bounds}, large={sorted(numbers)}"
    key = "\n".join((specialization.key, repr(sorted(classes.items())), options, _own_version()))
    code, facts = codegen.cached(key, name, machine), cache.read(key + "\nfacts")
    if code is None or facts is None:
        text = specialization.ttir()
        function = parse(text)
        try:
            ir = lower(function, classes, machine, check_bounds=check_bounds, large=numbers)
            code = codegen.compile_module(ir, name, machine, key=key, ttir=text)
        except (AssertionError, KeyError, RecursionError, RuntimeError) as error:
            if isinstance(error, UnsupportedOpError):
                raise
            raise UnsupportedOpError(
                f"{name} is not compiled for the CPU, by a fault of llama-fast: {error!r}"
            ) from error
        has_products = any(op.kind == "tt.dot" for op in function.ops())
        facts = json.dumps(dict(has_products=has_products, can_fail=can_fail(function, check_bounds))).encode()
        cache.write(key + "\nfacts", facts)
    known = json.loads(facts)
    kinds = [kind for _, kind in specialization.arguments]
    more = known["can_fail"] + check_bounds * 2 * sum(kind.startswith("*") for kind in kinds)
    letters = "".join(_LETTERS.get(kind, "q") for kind in kinds) + "q" * more
    return Compiled(Kernel(code, letters), tuple(names), **known, checks_bounds=check_bounds)


def _classes(names: list[str], pairs: tuple[tuple[str, str], ...]) -> dict[int, int]:
    """The number of each argument that shares memory with an earlier one, with the first such argument's."""
    classes: dict[int, int] = {}
    for left, right in pairs:
        if left in names and right in names:
            i, j = sorted(classes.get(names.index(name), names.index(name)) for name in (left, right))
            classes |= {number: i for number, first in classes.items() if first == j} | {j: i}
    return classes


@functools.cache
def _own_version() -> str:
    """Of the code that makes code: a change in it makes all objects on disk stale."""
    here = Path(__file__).parent
    files = sorted(here.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
