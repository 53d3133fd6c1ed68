"""From results to pictures: throughput over size, the roofline of all ops, speed of generating, decoding speed over context."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llama_fast.benchmarks.peers import OURS
from llama_fast.benchmarks.report.measured import Contest, Device, kinds
from llama_fast.benchmarks.report.plots import LIMIT, Panel, Picture, Series
from llama_fast.benchmarks.suite.record import Result
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.result import ContextPoint, Profile


def throughput(device: Device, op: str, contests: Sequence[Contest]) -> Picture | None:
    """Of an op that was measured at two sizes or more: a panel for each direction, dtype and bound, sizes from left to right."""
    panels = []
    for kind in kinds(contests):
        for memory in (True, False):
            chosen = [each for each in contests if each.kind == kind and each.timed and each.is_memory_bound == memory]
            if len(chosen) > 1:
                panels.append(_throughput_panel(kind, memory, chosen))
    title = f"{op} on {device.name}: throughput over size"
    return Picture(f"{device.folder}/{op}.svg", title, tuple(panels)) if panels else None


def _throughput_panel(kind: tuple[str, str], memory: bool, contests: Sequence[Contest]) -> Panel:
    scale, unit = (1e-9, "GB/s") if memory else _flops_unit(contests[0].record.limits)

    def rate(result: Result, seconds: float) -> float:
        return scale * (result.read + result.written if memory else result.flops) / seconds

    series = _series(
        [(x, result, rate(result, result.timing.median)) for x, each in enumerate(contests) for result in each.timed]
    )
    limit = tuple((x, rate(each.timed[0], each.timed[0].floor_s)) for x, each in enumerate(contests) if each.has_limit)
    return Panel(
        f"{', '.join(kind)},\nbound by {'memory' if memory else 'arithmetic'}", "", unit,
        (*series, Series(LIMIT, limit)) if limit else series, names=tuple(each.shape for each in contests),
        breaks=tuple(x for x in range(1, len(contests)) if contests[x].family != contests[x - 1].family),
    )  # fmt: skip


def _series(points: list[tuple[float, Result, float]]) -> tuple[Series, ...]:
    """Of x, who, y: one for each implementation, ours first."""
    names = dict.fromkeys(result.implementation for _, result, _ in points)
    return tuple(
        Series(name, tuple((x, y) for x, result, y in points if result.implementation == name))
        for name in sorted(names, key=lambda name: (not name.startswith(OURS), name))
    )


def _flops_unit(limits: Limits) -> tuple[float, str]:
    return (1e-12, "TFLOP/s") if max(limits.matmul_flops_per_s.values()) > 1e12 else (1e-9, "GFLOP/s")


def roofline(device: Device, ops: dict[str, list[Contest]]) -> Picture | None:
    """Each op's largest forward size: FLOPs a byte, and FLOPs a second. Ops whose FLOPs nobody counts are not in it."""
    series, limits = [], []
    for op, contests in ops.items():
        counted = [each for each in contests if each.ours and each.ours.samples and each.ours.flops and each.ours.read]
        if counted:
            largest = max(counted, key=lambda each: (each.direction == "forward", each.size))
            assert largest.ours is not None
            intensity = largest.ours.flops / (largest.ours.read + largest.ours.written)
            series.append((op, intensity, largest.ours.flops / largest.ours.timing.median))
            limits.append((largest.record.limits, largest.dtype))
    if len(series) < 2:
        return None
    measured, dtype = limits[0]
    scale, unit = _flops_unit(measured)
    top, bandwidth = measured.matmul_flops_per_s[dtype], measured.read_bytes_per_s
    low, high = min(x for _, x, _ in series) / 3, max(max(x for _, x, _ in series), top / bandwidth) * 3
    roof = tuple((x, scale * min(top, bandwidth * x)) for x in (low, top / bandwidth, high))
    points = tuple(Series(op, ((x, scale * y),), line=False) for op, x, y in series)
    panel = Panel(
        f"llama-fast, the largest size of each op; limit: reads, and {dtype} products", "FLOPs a byte that must move", unit,
        (Series(LIMIT, roof), *points), log_x=True, log_y=True,
    )  # fmt: skip
    return Picture(f"{device.folder}/roofline.svg", f"Roofline of {device.name}", (panel,))


def generating(device: Device, contests: Sequence[Contest]) -> Picture | None:
    """Tokens a second of all requests of a batch, a row for each size and dtype."""
    rows = [
        (each, int(found[1]))
        for each in contests
        if each.timed and each.direction == "inter-token latency" and (found := re.search(r"batch (\d+),", each.shape))
    ]
    if not rows:
        return None
    series = _series(
        [
            (x, result, batch / result.timing.median)
            for x, (each, batch) in enumerate(rows) for result in each.timed
        ]
    )  # fmt: skip
    names = tuple(f"{each.shape}, {each.dtype}" for each, _ in rows)
    panel = Panel(
        "further right is faster", "", "tokens/s", tuple(replace(each, line=False) for each in series), names=names
    )
    return Picture(f"{device.folder}/generating.svg", f"Generating on {device.name}", (panel,))


def decoding(device: Device, contests: Sequence[Contest]) -> Picture | None:
    """Tokens a second over context, a panel for each model, where a step was measured or profiled at two contexts or more."""
    models: dict[str, list[tuple[int, Contest]]] = {}
    for each in contests:
        found = re.fullmatch(r"(.+), (\d+) \+ \d+ tokens", each.shape)
        if found and each.timed and each.direction == "inter-token latency":
            models.setdefault(f"{found[1]}, {each.dtype}", []).append((int(found[2]), each))
    panels = [
        _decoding_panel(model, sorted(points, key=lambda point: point[0]))
        for model, points in models.items() if len({context for context, _ in points}) > 1
    ]  # fmt: skip
    panels += _profiled_panels(device.only(Profile))
    title = f"Decoding on {device.name}: speed over context"
    return Picture(f"{device.folder}/decoding.svg", title, tuple(panels)) if panels else None


def _decoding_panel(model: str, points: list[tuple[int, Contest]]) -> Panel:
    series = _series([(context, result, 1 / result.timing.median) for context, each in points for result in each.timed])
    limit = Series(LIMIT, tuple((context, 1 / each.timed[0].floor_s) for context, each in points if each.has_limit))
    contexts = tuple(sorted({context for context, _ in points}))
    return Panel(
        model,
        "tokens of the prompt",
        "tokens/s of one request",
        (*series, limit) if limit.points else series,
        log_x=True,
        ticks=contexts,
    )


def _profiled_panels(profiles: Mapping[str, Profile]) -> list[Panel]:
    """Tokens a second over context: a panel for each model, dtype and batch that was measured at two contexts or more."""
    groups: dict[str, list[ContextPoint]] = {}
    for profile in profiles.values():
        for point in profile.contexts:
            if point.measured is not None:
                groups.setdefault(f"{profile.model}, {profile.dtype}, batch {point.batch}", []).append(point)
    return [
        _profiled_panel(title, found) for title, found in groups.items() if len({point.context for point in found}) > 1
    ]


def _profiled_panel(title: str, points: list[ContextPoint]) -> Panel:
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
