"""`llama-fast bench`: which cases there are, and one run over them into a `Record`."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llama_fast.benchmarks.models import StoredModel
from llama_fast.benchmarks.peers import Unavailable
from llama_fast.benchmarks.suite.comparison import CALL_ERRORS, Case, first_line, release, unavailable
from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.profiler.machine import gpu_state, machine
from llama_fast.profiler.measure.limits import Limits, measure_limits

WHOLE = {"layer": "layer", "prefill": "prefill", "generate": "generate", "train": "train_step"}
"""The kinds of work that are more than one op, and the ends of their files' names."""

KINDS = ("kernels", *WHOLE)

CLOCK_WARNING = 0.02
_HARMLESS_THROTTLING = {"", "0x0000000000000000", "0x0000000000000001"}  # none, and none but that it idles

Progress = Callable[[str, int, int], None]
"""What is being measured, how many are done, how many there are."""


class GpuFailure(Exception):
    """The GPU is in a state in which nothing more can be measured in this process."""


def modules(kind: str) -> list[ModuleType]:
    """The benchmark files of a kind of work: those that have `cases`."""
    names = [f"bench_{WHOLE[kind]}"] if kind in WHOLE else kernel_files()
    return [importlib.import_module(f"llama_fast.benchmarks.{name}") for name in names]


def kernel_files() -> list[str]:
    """Of the ops, without `.py`."""
    whole = {f"bench_{end}" for end in WHOLE.values()}
    files = sorted(Path(__file__).parents[1].glob("bench_*.py"))
    return [file.stem for file in files if file.stem not in whole and "\ndef cases(" in file.read_text()]


def find_cases(
    kinds: Sequence[str],
    ops: Sequence[str] | None,
    device: torch.device,
    *,
    quick: bool,
    model: StoredModel | None = None,
) -> list[Case]:
    """The cases of these kinds, or those of them whose op, or whose file's name, is among `ops`; those of "generate" of a `model`.

    Raises:
        ValueError: there is no such op.
    """
    stored = {} if model is None else {"model": model}
    cases: list[tuple[str, Case]] = [
        (module.__name__.rpartition("bench_")[2], case)
        for kind in kinds for module in modules(kind) for case in module.cases(device, quick=quick, **stored)
    ]  # fmt: skip
    if ops is None:
        return [case for _, case in cases]
    known = sorted({name for stem, case in cases for name in (stem, case.op)})
    for op in ops:
        if op not in known:
            raise ValueError(f"there is no benchmark of {op!r} in {', '.join(kinds)}; choose from {', '.join(known)}")
    return [case for stem, case in cases if stem in ops or case.op in ops]


def kernel_cases(name: str, device: torch.device, *, quick: bool) -> list[Case]:
    """The cases of one op's file."""
    found: list[Case] = importlib.import_module(f"llama_fast.benchmarks.bench_{name}").cases(device, quick=quick)
    return found


def new_record(device: torch.device, settings: dict[str, Any], *, quick: bool) -> Record:
    """An empty record of this machine, whose limits are measured now."""
    limits = measure_limits(device, quick=quick)
    return Record(machine(device), limits, settings | {"quick": quick, "device": device.type})


def run_cases(
    record: Record, cases: Sequence[Case], device: torch.device, *, seconds: float, progress: Progress = lambda *_: None
) -> None:
    """Measures the cases into `record`, each implementation for `seconds`; it holds what is done if this is interrupted.

    Raises:
        GpuFailure: a kernel broke the GPU's context: what was measured before is in `record`.
    """
    record.skipped.extend(skipped for skipped in unavailable(cases) if skipped not in record.skipped)
    state = gpu_state(device) if device.type == "cuda" else {}
    for done, case in enumerate(cases):
        progress(case_name(case), done, len(cases))
        results = _measured(case, device, record.limits, seconds)
        loss = _loss(device) if device.type == "cuda" else None
        record.results.extend(results if loss is None else map(_doubted, results))
        if loss is not None:
            raise GpuFailure(f"after {case_name(case)} the GPU answers nothing more: {loss}")
        if device.type == "cuda":
            before, state = state, gpu_state(device)
            record.warnings.extend(_clock_warnings(case, before, state))
            record.settings.setdefault("gpu_states", []).append(state)
        release()
    progress("", len(cases), len(cases))


def work_key(case: Case) -> tuple[str, str, str, str]:
    """That of the case's results."""
    return case.op, case.shape, str(case.dtype).removeprefix("torch."), case.direction


def case_name(case: Case) -> str:
    """For people."""
    return ", ".join(work_key(case))


def _measured(case: Case, device: torch.device, limits: Limits, seconds: float) -> list[Result]:
    """The case's results. One that cannot be done at all (its tensors do not fit) is a failure of each implementation."""
    try:
        return case.measure(device, limits, seconds=seconds)
    except CALL_ERRORS as error:
        return failed(case, f"{type(error).__name__}: {first_line(error)}")


def failed(case: Case, failure: str) -> list[Result]:
    """A case that none of its implementations could do, for a reason of its own."""
    op, shape, dtype, direction = work_key(case)
    return [
        Result(op, shape, dtype, direction, name, failure=failure)
        for name, peer in case.implementations().items() if not isinstance(peer, Unavailable)
    ]  # fmt: skip


def _loss(device: torch.device) -> str | None:
    """Why the GPU answers nothing any more: an illegal address ends the context for good, and every call after it fails."""
    try:
        torch.cuda.synchronize(device)
    except torch.AcceleratorError as error:
        return first_line(error)
    return None


def _doubted(result: Result) -> Result:
    """Where the GPU was lost all that came later failed as well: none of it is the implementation's own failure for sure."""
    if result.failure is None:
        return result
    return replace(result, failure=f"this implementation, or one before it, lost the GPU: {result.failure}")


def _clock_warnings(case: Case, before: dict[str, str], after: dict[str, str]) -> list[str]:
    warnings = []
    old, new = _megahertz(before), _megahertz(after)
    if old and new and abs(new / old - 1) > CLOCK_WARNING:
        warnings.append(f"{case_name(case)}: the SM clock went from {old:.0f} to {new:.0f} MHz")
    throttled = after.get("clocks_throttle_reasons.active", "")
    if throttled not in _HARMLESS_THROTTLING:
        warnings.append(f"{case_name(case)}: the GPU held its clock back, reasons {throttled}")
    return warnings


def _megahertz(state: dict[str, str]) -> float | None:
    """The SM clock, as nvidia-smi writes it ("1980 MHz", or "[N/A]")."""
    number = state.get("clocks.sm", "").removesuffix(" MHz")
    return float(number) if number.replace(".", "", 1).isdigit() else None
