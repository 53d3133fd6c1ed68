"""What files other than records add to the page: latencies of whole models, by profiles; which plans a sweep replaced; which tests passed there."""

from collections.abc import Iterator, Mapping

from llama_fast.benchmarks.peers import OURS
from llama_fast.benchmarks.suite.pytest_groups import SuiteRuns
from llama_fast.benchmarks.suite.sweep import Sweep
from llama_fast.profiler.measure.sides import FUSED
from llama_fast.profiler.report import view
from llama_fast.profiler.result import Profile, Run
from llama_fast.profiler.significance import difference_in_turns
from llama_fast.reports import units


def cell(text: str) -> str:
    """Text from a file, which may hold HTML or the end of a table's cell, as Markdown that shows it as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def latencies(profiles: Mapping[str, Profile]) -> list[str]:
    """A table of every run of every profile."""
    if not profiles:
        return []
    lines = [
        "",
        "Latency of whole models (`llama-fast profile`): medians. The floor is what a decoding step must move and compute at the measured limits.",
        "",
        "| model | side | prompt | batch | time to first token | between tokens | its p99 | tokens/s, all requests | floor of a step | share of the limit |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for profile in profiles.values():
        lines += [_row(profile, run) for run in profile.runs]
    return lines


def _row(profile: Profile, run: Run) -> str:
    itl = run.latency.itl
    floor = sum(part.seconds for part in run.token.parts if part.kind == "floor")
    return (
        f"| {cell(profile.model)}, {profile.dtype} | {cell(run.side)} | {units.tokens(run.prompt_tokens)} | {run.latency.batch} "
        f"| {units.duration(run.latency.ttft.median)} | {units.duration(itl.median)} | {units.duration(itl.quantile(0.99))} "
        f"| {units.number(run.latency.total_tokens_per_s)} | {units.duration(floor)} | {units.percent(floor / itl.median)} |"
    )


def losses(profiles: Mapping[str, Profile]) -> Iterator[tuple[str, str, str, float, float, str]]:
    """(op, shape, kind, our median, the fastest other's, who that is): each latency in which another side is faster beyond the noise."""
    for profile in profiles.values():
        for subject, *others in view.settings(profile):
            others = [run for run in others if run.side != FUSED]
            if subject.side not in (OURS, FUSED) or not others:
                continue
            for name in ("TTFT", "ITL"):
                ours, *theirs = (view.metrics(run.latency)[name] for run in (subject, *others))
                fastest, side = min(
                    zip(theirs, (run.side for run in others), strict=True), key=lambda each: each[0].median
                )
                if difference_in_turns(fastest.samples, ours.samples).is_slower:
                    shape = f"{profile.model}, {view.setting_name(subject)}"
                    yield "profile", shape, f"{name}, {profile.dtype}", ours.median, fastest.median, side


def tests(suites: Mapping[str, SuiteRuns]) -> list[str]:
    """What of the test suite passed there, and what failed."""
    if not suites:
        return []
    lines = ["", "The test suite there:", "", "| tests | passed | failed | skipped |", "|---|---:|---:|---:|"]
    failures = []
    for suite in suites.values():
        for run in suite.runs:
            lines.append(f"| `{' '.join(run.group)}` | {run.passed} | {run.failed} | {run.skipped} |")
            failures += [next(iter(failure.splitlines()), "") for failure in run.failures]
        if not suite.complete:
            lines.append("| the rest | not run | | |")
    return lines + (["", *(f"- failed: {cell(failure)}" for failure in failures)] if failures else [])


def plans(sweeps: Mapping[str, Sweep]) -> list[str]:
    """Which plans a sweep replaced, and by how much each is faster than the arithmetic's."""
    if not sweeps:
        return []
    lines = [""]
    for sweep in sweeps.values():
        tried = sum(len(key.tried) for key in sweep.keys)
        lines.append(
            f"A sweep tried {tried} plans for {len(sweep.keys)} sizes, and replaced {len(sweep.entries)} of the arithmetic's choices"
            + (f"; without an answer: {cell(', '.join(sweep.failed))}." if sweep.failed else ".")
        )
        if sweep.entries:
            lines += ["", "| op | size | plan | time / arithmetic's |", "|---|---|---|---:|"]
        for key in sweep.keys:
            if key.entry is not None:
                plan = ", ".join(f"{name} {value}" for name, value in key.entry.plan.items())
                ratio = key.entry.seconds / key.entry.arithmetic_seconds
                lines.append(f"| {key.op} | {' x '.join(map(str, key.size))} | {plan} | {ratio:.2f}x |")
    return lines
