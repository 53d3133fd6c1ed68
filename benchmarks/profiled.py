"""What the profiles among the result files add to the page: latencies of whole models, and decoding speed over context."""

from collections.abc import Mapping

from llama_fast.benchmarks.plots import LIMIT, Panel, Series
from llama_fast.profiler import units
from llama_fast.profiler.result import ContextPoint, Profile, Run


def latencies(profiles: Mapping[str, Profile]) -> list[str]:
    """A table of every run of every profile."""
    lines = [
        "Latency of whole models (`llama-fast profile`): medians; the floor is what a decoding step must read, at the measured bandwidth.",
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
        f"| {profile.model}, {profile.dtype} | {run.side} | {units.tokens(run.prompt_tokens)} | {run.latency.batch} "
        f"| {units.duration(run.latency.ttft.median)} | {units.duration(itl.median)} | {units.duration(itl.quantile(0.99))} "
        f"| {units.number(run.latency.total_tokens_per_s)} | {units.duration(floor)} | {units.percent(floor / itl.median)} |"
    )


def over_context(profiles: Mapping[str, Profile]) -> list[Panel]:
    """Tokens a second over context: a panel for each model, dtype and batch that was measured at two contexts or more."""
    groups: dict[str, list[ContextPoint]] = {}
    for profile in profiles.values():
        for point in profile.contexts:
            if point.measured is not None:
                groups.setdefault(f"{profile.model}, {profile.dtype}, batch {point.batch}", []).append(point)
    return [_panel(title, found) for title, found in groups.items() if len({point.context for point in found}) > 1]


def _panel(title: str, points: list[ContextPoint]) -> Panel:
    points = sorted(points, key=lambda point: point.context)
    series = [
        Series(
            side,
            tuple((p.context, 1 / p.measured.median) for p in points if p.side == side and p.measured is not None),
        )
        for side in dict.fromkeys(point.side for point in points)
    ]
    floors = {point.context: point.floor for point in points}
    limit = Series(LIMIT, tuple((context, 1 / floor) for context, floor in floors.items()))
    return Panel(title, "context, tokens", "tokens/s of one request", (*series, limit), log_x=True, ticks=tuple(floors))
