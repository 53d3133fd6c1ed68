"""A sweep of plans on a GPU: what is faster than the arithmetic's choice, and passes the same parity, enters the table of tuned plans.

For each key that the benchmarks' own cases look up, all candidates are judged by the error rule and timed in turns on the
first case; the FINALISTS fastest are judged and timed again, for longer, on all cases of the key. The best enters if it beats the
arithmetic's choice by more than MINIMUM_GAIN over all, is slower in none, and its binaries do not spill.

`python -m llama_fast.benchmarks.sweep DIR/sweep.json` merges what a sweep found into `kernels/tuned_plans.json`.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from llama_fast.benchmarks import (
    bench_attention,
    bench_attention_decode,
    bench_linear,
    bench_norm_qkv_rope,
    bench_norm_swiglu,
    bench_rms_norm,
    bench_softmax,
)
from llama_fast.benchmarks.peers import BASELINE, OURS, Unavailable
from llama_fast.benchmarks.suite.candidates import candidates, fault, launches
from llama_fast.benchmarks.suite.comparison import FORWARD, OpCase, Problem, first_line, judge, release, timed
from llama_fast.benchmarks.suite.record import Result
from llama_fast.benchmarks.suite.run import case_name
from llama_fast.kernels import tuned
from llama_fast.kernels.launch import Gpu, gpu_of
from llama_fast.kernels.triton_compat import triton
from llama_fast.kernels.tuned import Entry, Key, Plan, asked, candidate
from llama_fast.profiler.measure.limits import Limits
from llama_fast.reports.jsonfile import read_json

FILES = (
    bench_norm_swiglu, bench_norm_qkv_rope, bench_attention_decode, bench_linear, bench_attention, bench_rms_norm,
    bench_softmax,
)  # fmt: skip
"""In the order of what a decoding step gains."""

MINIMUM_GAIN = 0.02
FINALISTS = 4
AT_ONCE = 12
"""Plans that are timed in turns in the first round."""
FIRST_SECONDS, FINAL_SECONDS = 0.03, 0.3
"""That each candidate is timed in the first round, and in the second."""


@dataclass(frozen=True)
class Tried:
    """A plan, or the arithmetic's choice (None): its median on each case, its worst error, or what it failed by."""

    plan: Plan | None
    seconds: list[float]
    error: float | None
    bound: float | None
    failure: str | None


@dataclass(frozen=True)
class KeySweep:
    """All that was tried for a key, in the round that decided; `entry` is what won, if anything did."""

    op: str
    size: tuple[int, ...]
    cases: list[str]
    tried: list[Tried]
    entry: Entry | None


@dataclass
class Sweep:
    """A sweep's file. `running` is the key being tried: one that ended its process stands there when the next one starts."""

    machine: dict[str, Any]
    arch: str
    multiprocessors: int
    complete: bool = False
    running: str | None = None
    keys: list[KeySweep] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [key.entry for key in self.keys if key.entry is not None]


def run_sweep(
    sweep: Sweep, device: torch.device, limits: Limits, *, quick: bool, deadline: float,
    save: Callable[[], None], progress: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    """Sweeps the keys that `sweep` does not have yet, until `deadline` (of `time.monotonic`); `save` is called after each."""
    if sweep.running is not None:
        sweep.failed.append(sweep.running)
        sweep.running = None
    progress("which plans the cases look up", 0, 1)
    work = keys_of([case for file in FILES for case in file.cases(device, quick=quick)], device, sweep.failed)
    left = {key: cases for key, cases in work.items() if not _is_known(key, sweep)}
    longest = 10.0
    with _compiling(list(left), gpu_of(device)) as compiling:
        for number, (key, cases) in enumerate(left.items(), len(work) - len(left)):
            progress(_name(key), number, len(work))
            wait(compiling[key], max(0.0, deadline - time.monotonic()))
            if time.monotonic() + longest > deadline:
                return
            start = time.monotonic()
            _sweep_one(sweep, key, cases, device, limits, save)
            longest = max(longest, time.monotonic() - start)
    sweep.complete = True
    save()


def _sweep_one(
    sweep: Sweep, key: Key, cases: Sequence[OpCase], device: torch.device, limits: Limits, save: Callable[[], None]
) -> None:
    sweep.running = _name(key)
    save()
    try:
        sweep.keys.append(sweep_key(key, cases, device, limits))
    except (triton.TritonError, RuntimeError) as error:
        sweep.failed.append(f"{_name(key)}: {first_line(error)}")
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises, and ends this process, where a kernel broke the context
    sweep.running = None
    save()


def _name(key: Key) -> str:
    return f"{key[0]} {'x'.join(map(str, key[4]))}"


def _is_known(key: Key, sweep: Sweep) -> bool:
    return any(each.partition(":")[0] == _name(key) for each in sweep.failed) or any(
        (each.op, each.size) == (key[0], key[4]) for each in sweep.keys
    )


def keys_of(cases: Sequence[OpCase], device: torch.device, failed: list[str]) -> dict[Key, list[OpCase]]:
    """The keys that our implementation looks up, with the forward cases that do. Cases that fail are named in `failed`."""
    found: dict[Key, list[OpCase]] = {}
    for case in cases:
        if case.direction != FORWARD:
            continue
        ours = _ours(case)
        try:
            with asked() as keys:
                problem = case.build(device)
                problem.results(ours, problem.inputs, FORWARD)
                del problem
        except (triton.TritonError, RuntimeError) as error:
            failed.extend({f"{case_name(case)}: {first_line(error)}"}.difference(failed))
            continue
        for key in dict.fromkeys(keys):
            if key[0] == case.op or key[0].startswith(f"{case.op}_few"):
                found.setdefault(key, []).append(case)
        release()
    return found


@contextmanager
def _compiling(keys: Sequence[Key], gpu: Gpu) -> Iterator[dict[Key, list[Future[None]]]]:
    """All candidates' binaries on their way into Triton's cache, key after key, beside what the GPU does: one alone takes 0.5 to 2 s."""
    workers = max(1, (os.cpu_count() or 1) - 2)  # the rest is for what launches
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield {key: [pool.submit(_compile, key, plan, gpu) for plan in candidates(key, gpu)] for key in keys}
        finally:
            pool.shutdown(cancel_futures=True)


def _compile(key: Key, plan: Plan, gpu: Gpu) -> None:
    with candidate(key, plan):
        plans = launches(key, gpu)
    for launch in plans:
        try:
            launch.compile(gpu)
        except (triton.TritonError, RuntimeError):  # it fails again, with its reason, where it is judged
            return


def sweep_key(key: Key, cases: Sequence[OpCase], device: torch.device, limits: Limits) -> KeySweep:
    """Both rounds. What fails in the first is listed with its reason."""
    plans: list[Plan | None] = [None, *candidates(key, gpu_of(device))]
    first = []
    for start in range(0, len(plans), AT_ONCE):  # each plan's CUDA graph keeps its outputs' memory
        first += _measure(key, cases[0], plans[start : start + AT_ONCE], device, limits, FIRST_SECONDS)
    failed = [Tried(plan, [], r.error, r.bound, r.failure) for plan, r in zip(plans, first, strict=True) if r.failure]
    passed = [(r.timing.median, i) for i, r in enumerate(first) if r.samples]
    fastest = [plans[i] for _, i in sorted(passed)[:FINALISTS] if i]
    finalists: list[Plan | None] = [None, *fastest]
    rounds = [_measure(key, case, finalists, device, limits, FINAL_SECONDS) for case in cases]
    tried = [_together(plan, [results[i] for results in rounds]) for i, plan in enumerate(finalists)]
    names = [case_name(case) for case in cases]
    return KeySweep(key[0], key[4], names, tried + failed, _winner(key, tried, names, device))


def _measure(
    key: Key, case: OpCase, plans: Sequence[Plan | None], device: torch.device, limits: Limits, seconds: float
) -> list[Result]:
    """Our implementation under each plan, judged beside PyTorch's and timed in turns."""
    release()
    torch.manual_seed(0)
    problem = case.build(device)
    expected = problem.results(problem.reference, tuple(map(_double, problem.inputs)), FORWARD)
    ours = _ours(case)
    named = {f"{OURS} {i}": partial(_under, key, plan, ours) for i, plan in enumerate(plans)}
    once: dict[str, Any] = {name: _once(problem, run) for name, run in named.items()}
    baseline = case.implementations()[BASELINE]
    if not isinstance(baseline, Unavailable):
        once[BASELINE] = _once(problem, baseline)
    judged = judge(case, expected, once)
    del expected
    calls = {name: problem.call(run, problem.inputs, FORWARD) for name, run in named.items()}
    return timed(case, {name: judged[name] for name in named}, calls, device, seconds, limits, problem.work)


def _ours(case: OpCase) -> Callable[..., Any]:
    ours = case.implementations()[OURS]
    assert not isinstance(ours, Unavailable)
    return ours


def _once(problem: Problem, run: Callable[..., Any]) -> Callable[[], Any]:
    def call() -> Any:
        inputs = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in problem.inputs)
        return problem.results(run, inputs, FORWARD)

    return call


def _under(key: Key, plan: Plan | None, ours: Callable[..., Any], *inputs: Any) -> Any:
    """Our implementation as the table would make it; a plan that the compiler or the GPU refuses is an error like others."""
    with candidate(key, plan):
        try:
            return ours(*inputs)
        except triton.TritonError as error:
            raise RuntimeError(str(error)) from error


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _together(plan: Plan | None, results: list[Result]) -> Tried:
    """A plan on all cases of its key: it fails if it fails in one."""
    failure = next((result.failure for result in results if result.failure), None)
    worst = max(results, key=lambda result: (result.error or 0.0) / (result.bound or 1.0))
    seconds = [] if failure else [result.timing.median for result in results]
    return Tried(plan, seconds, worst.error, worst.bound, failure)


def _winner(key: Key, tried: Sequence[Tried], cases: list[str], device: torch.device) -> Entry | None:
    arithmetic, gpu = tried[0], gpu_of(device)
    if not arithmetic.seconds:
        return None

    def gain(each: Tried) -> float:
        return math.exp(
            statistics.fmean(math.log(b / a) for a, b in zip(arithmetic.seconds, each.seconds, strict=True))
        )

    for best in sorted((each for each in tried[1:] if each.seconds), key=gain):
        slowest = max(b / a for a, b in zip(arithmetic.seconds, best.seconds, strict=True))
        if gain(best) >= 1 - MINIMUM_GAIN:
            return None
        assert best.plan is not None and best.error is not None and best.bound is not None
        if slowest > 1 + MINIMUM_GAIN or fault(key, best.plan, gpu) is not None:
            continue
        return Entry(
            key[0], key[1], key[2], str(key[3]).removeprefix("torch."), key[4], best.plan,
            torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter", tuple(cases),
            sum(best.seconds), sum(arithmetic.seconds), best.error, best.bound,
        )  # fmt: skip
    return None


def merge(files: Sequence[Path], table: Path = tuned.TABLE) -> int:
    """Enters what sweeps found into the table; a key that was swept again loses the entry that did not win again. Returns how many there are."""
    entries = {entry.key: entry for entry in tuned.read_table(table)}
    for file in files:
        sweep = read_json(file, Sweep)
        swept = {(key.op, sweep.arch, sweep.multiprocessors, key.size) for key in sweep.keys}
        entries = {key: entry for key, entry in entries.items() if (*key[:3], key[4]) not in swept}
        entries |= {entry.key: entry for entry in sweep.entries}
    tuned.write_table(table, list(entries.values()))
    return len(entries)


if __name__ == "__main__":
    print(f"{merge([Path(name) for name in sys.argv[1:]])} entries in {tuned.TABLE}")
