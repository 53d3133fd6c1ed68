"""A campaign's folder in a few lines: what is done, what is left, and the figures that matter."""

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from llama_fast.benchmarks.peers import BASELINE, OURS
from llama_fast.benchmarks.report.measured import read_file
from llama_fast.benchmarks.report.tables import fits_cache
from llama_fast.benchmarks.suite.campaign import Part, is_complete
from llama_fast.benchmarks.suite.pytest_groups import SuiteRuns
from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.benchmarks.suite.sweep import Sweep
from llama_fast.profiler.result import Profile


def headlines(folder: Path, parts: Sequence[Part]) -> list[tuple[str, str, str]]:
    """(part, "done", "begun" or "to do", figures)."""
    rows = []
    for part in parts:
        file = folder / f"{part.name}.json"
        state = "done" if is_complete(file) else "begun" if file.exists() else "to do"
        rows.append((part.name, state, _headline(file) if file.exists() else ""))
    return rows


def _headline(file: Path) -> str:
    found = read_file(file)
    if isinstance(found, Profile):
        latency = found.runs[0].latency
        return f"{1e3 * latency.itl.median:.3f} ms a token, first token {1e3 * latency.ttft.median:.1f} ms"
    if isinstance(found, SuiteRuns):
        return f"{sum(run.passed for run in found.runs)} passed, {sum(run.failed for run in found.runs)} failed"
    return _of_sweep(found) if isinstance(found, Sweep) else _of_record(found)


def _of_sweep(sweep: Sweep) -> str:
    if not sweep.keys:
        return ", ".join(sweep.failed)
    best = min((entry.seconds / entry.arithmetic_seconds for entry in sweep.entries), default=1.0)
    return f"{len(sweep.entries)} of {len(sweep.keys)} plans replaced, the best by {1 - best:.0%}"


def _of_record(record: Record) -> str:
    if not record.results:
        return (
            f"read {1e-9 * record.limits.read_bytes_per_s:.4g} GB/s, "
            f"bfloat16 {1e-12 * record.limits.matmul_flops_per_s['bfloat16']:.3g} TFLOP/s"
        )
    works = [list(group) for _, group in groupby(record.results, key=lambda result: result.work_key)]
    ratios = [ratio for work in works if (ratio := _ratio(work)) is not None]
    shares = [
        each.share_of_limit for each in record.results
        if each.implementation == OURS and each.samples and not fits_cache(each, record)
    ]  # fmt: skip
    failed = sum(each.failure is not None and each.implementation.startswith(OURS) for each in record.results)
    told = [f"{len(works)} works"]
    if ratios:
        told.append(f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f}x {BASELINE}")
    if shares:
        told.append(f"{statistics.median(shares):.0%} of limit")
    return ", ".join(told + [f"{failed} of ours FAIL"] * bool(failed))


def _ratio(work: list[Result]) -> float | None:
    """How many times faster than PyTorch we are."""
    timed = {result.implementation: result.timing.median for result in work if result.samples}
    return timed[BASELINE] / timed[OURS] if {BASELINE, OURS} <= timed.keys() else None
