"""The performance page in Markdown: what the hardware allows, what was measured where, who lost, and what was not measured."""

import re
from collections.abc import Iterable, Mapping, Sequence

from llama_fast.benchmarks.peers import OURS
from llama_fast.benchmarks.report import arithmetic, pictures, sections
from llama_fast.benchmarks.report.measured import Contest, Device, by_op, geometric_mean, kinds
from llama_fast.benchmarks.report.plots import Picture
from llama_fast.benchmarks.report.sections import cell
from llama_fast.benchmarks.suite.pytest_groups import SuiteRuns
from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.benchmarks.suite.sweep import Sweep
from llama_fast.profiler.result import Profile
from llama_fast.profiler.significance import MINIMUM_EFFECT
from llama_fast.reports import units

WorkKey = tuple[str, str, str, str]
"""Op, shape, dtype, direction: a piece of work."""

WANTED_GPUS = ("A100", "H100", "H200", "B200", "MI300X")
"""That every kernel is compiled for in the tests."""

PAGE = "performance.md"
FOLDER = "performance"
"""Beside the page, for its pictures."""

_ORIGIN = (
    "`python -m llama_fast.benchmarks.report` writes this page from the files in [benchmarks/results](../benchmarks/results). No "
    "measurement on it comes from anywhere else, and a test fails when they differ. How it is measured: [benchmarking.md](benchmarking.md)."
)


def page(devices: Sequence[Device], cases: Mapping[str, Iterable[WorkKey]]) -> tuple[str, list[Picture]]:
    """The Markdown and its pictures. `cases` are all that the suite can measure on a device of type "cuda", and "cpu".

    Raises:
        ValueError: two files have results of the same work.
    """
    gpus = [device for device in devices if device.is_gpu]
    order = list(dict.fromkeys(key[0] for keys in cases.values() for key in keys))
    allowed = arithmetic.picture(_rates(gpus))  # beside a GPU a CPU is a line at the bottom
    measured, shown = _devices(devices, order)
    opening = ["# Performance", "", _ORIGIN, "", _state(devices), "", *arithmetic.opening(_rates(devices)), ""]
    lines = [*opening, *_shown(allowed), *measured, "", *_not_measured(devices, gpus, cases, order)]
    return "\n".join(lines) + "\n", [allowed, *shown]


def page_of_one_run(device: Device) -> tuple[str, list[Picture]]:
    """The same of somebody's own measurement: what stands in it, in its order, and nothing of what could be measured besides."""
    measured, shown = _devices([device], [contest.op for contest in device.contests])
    quick = any(record.settings.get("quick") for record in device.only(Record).values())
    said = (
        "Measured by `llama-fast bench --quick`: few sizes, little time."
        if quick
        else "Measured by `llama-fast bench`."
    )
    return "\n".join(["# Performance", "", said + _on_cpus([] if device.is_gpu else [device]), *measured]) + "\n", shown


def _devices(devices: Sequence[Device], order: list[str]) -> tuple[list[str], list[Picture]]:
    lines, shown = [], []
    for device in devices:
        section, drawn = _device(device, by_op(device.contests, order))
        lines += ["", *section]
        shown += drawn
    return lines, shown


def _rates(devices: Sequence[Device]) -> list[arithmetic.Rates]:
    """Of each device that has limits, those of its first file."""
    found = [(device.name, next(iter(device.limits.values()), None)) for device in devices]
    return [arithmetic.Rates.measured(name, limits) for name, limits in found if limits]


def _state(devices: Sequence[Device]) -> str:
    gpus = [cell(device.name) for device in devices if device.is_gpu]
    others = [device for device in devices if not device.is_gpu]
    if gpus:
        return f"Measured on: {', '.join(gpus)}." + _on_cpus(others)
    return (
        "**No GPU has been measured yet.** No figure on this page says how fast a kernel of llama-fast is on one. What stands here: what "
        "the hardware allows by its published rates, and what is not measured." + _on_cpus(others)
    )


def _on_cpus(devices: Sequence[Device]) -> str:
    natively = [device for device in devices if "native" in device.machine.get("kernels", "")]
    pytorch = [device for device in devices if device not in natively]
    said = ""
    if natively:
        said += (
            f" CPUs ({_names(natively)}) ran the Triton kernels, compiled for them by `kernels/native/` ([how](native.md)), and PyTorch's "
            "ops where those are faster."
        )
    if pytorch:
        said += (
            f" On CPUs ({_names(pytorch)}) no Triton kernel ran: the ops were PyTorch's own when this was measured, arranged by "
            "llama-fast. Figures from those show that the suite works, and what the engine and its layers do; they say nothing about the kernels."
        )
    return said


def _names(devices: Sequence[Device]) -> str:
    return ", ".join(cell(device.name) for device in devices)


def _device(device: Device, ops: dict[str, list[Contest]]) -> tuple[list[str], list[Picture]]:
    shown: list[Picture] = []
    lines = [f"## {cell(device.name)}", "", *_machine(device), *_limits(device)]
    if ops:
        lines += ["", *_summary(ops)]
    profiles = device.only(Profile)
    if ops or profiles:
        lines += ["", *_losses(ops, profiles)]
    lines += sections.latencies(profiles) + sections.plans(device.only(Sweep))
    lines += sections.tests(device.only(SuiteRuns))
    generate = ops.get("generate", [])
    for picture in (
        pictures.roofline(device, ops), pictures.generating(device, generate), pictures.decoding(device, generate),
    ):  # fmt: skip
        if picture:
            lines += ["", *_shown(picture)]
            shown.append(picture)
    for op, contests in ops.items():
        picture = pictures.throughput(device, op, contests)
        lines += ["", f"### {cell(op)}, {cell(device.name)}"]
        if picture:
            lines += ["", *_shown(picture)]
            shown.append(picture)
        lines += ["", *_tables(contests)]
    lines += _left_out(device)
    return lines, shown


def _shown(picture: Picture) -> list[str]:
    return [f"![{cell(picture.title)}]({FOLDER}/{picture.file})"]


def _machine(device: Device) -> list[str]:
    """What the figures depend on; where files differ, all that occurs."""
    machines = [file.machine for file in device.files.values()]
    versions = [{name: v for name, v in machine["versions"].items() if v != "not installed"} for machine in machines]
    facts: dict[str, list[str | None]] = {
        "processor": [f"{machine['processor']}, threads: {machine['threads']}" for machine in machines],
        "CUDA": [machine.get("cuda") for machine in machines],
        "kernels": [machine.get("kernels") for machine in machines],
        "versions": [", ".join(f"{name} {version}" for name, version in found.items()) for found in versions],
        "commit": [re.sub("^([0-9a-f]{12})[0-9a-f]+", r"\1", machine["commit"] or "") for machine in machines],
        "date": [machine.get("date") for machine in machines],
    }
    lines = ["| what | at the time |", "|---|---|"]
    for label, values in facts.items():
        there = dict.fromkeys(value for value in values if value)
        if there:
            lines.append(f"| {label} | {'<br>'.join(map(cell, there))} |")
    states = [machine.get("gpu_state", {}) for machine in machines]
    for label, query in _GPU_FACTS.items():
        found = _span([state[query] for state in states if query in state])
        if found:
            lines.append(f"| {label} | {found} |")
    return lines


_GPU_FACTS = {
    "driver": "driver_version", "SM clock before each part": "clocks.sm", "its largest": "clocks.max.sm", "memory clock": "clocks.mem",
    "power before each part": "power.draw", "its limit": "power.limit", "temperature, °C": "temperature.gpu",
}  # fmt: skip
"""Of nvidia-smi, by what the page calls them."""


def _span(values: list[str]) -> str:
    """ "1980 MHz", or "1755 to 1980 MHz" of several; all of them where they are no numbers."""
    different = sorted(set(values))
    numbers = [re.fullmatch(r"([\d.]+)( \w+)?", value) for value in different]
    try:
        found = [(float(match[1]), match[2] or "") for match in numbers if match]
    except ValueError:  # a driver's version has two points
        found = []
    if len(different) < 2 or len(found) < len(different):
        return ", ".join(different)
    (low, _), (high, unit) = min(found), max(found)
    return f"{low:g} to {high:g}{unit}"


def _limits(device: Device) -> list[str]:
    if not device.limits:
        return []
    lines = [
        "",
        "Its limits, as measured before the figures:",
        "",
        "| file | reads | copies (read + written) | bfloat16 products | float16 | float32 | a launch | a graph's node |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    files: dict[str, list[str]] = {}
    for name, limits in device.limits.items():
        rates = limits.matmul_flops_per_s
        products = " | ".join(f"{units.flops(rates[dtype])}/s" for dtype in ("bfloat16", "float16", "float32"))
        node = "" if limits.graph_node_s is None else units.duration(limits.graph_node_s)
        cells = (
            f"{units.size(limits.read_bytes_per_s)}/s | {units.size(limits.copy_bytes_per_s)}/s | {products} "
            f"| {units.duration(limits.launch_s)} | {node}"
        )
        record = device.only(Record).get(name)
        quick = " (a quick run)" if record and record.settings.get("quick") else ""
        files.setdefault(cells, []).append(f"`{name}`{quick}")
    lines += [f"| {', '.join(names)} | {cells} |" for cells, names in files.items()]
    return lines


def _summary(ops: dict[str, list[Contest]]) -> list[str]:
    timings = [result.timing for contests in ops.values() for each in contests for result in each.timed]
    noisy = [timing for timing in timings if timing.is_noisy]
    lines = [
        "llama-fast beside the fastest of its peers at each size. Faster and slower are beyond the noise and by at least 3 %, even is what "
        'cannot be told apart; the speeds and the shares are geometric means over the sizes. Of layers and whole models "PyTorch" is '
        f"transformers as it is. p20 and p80 are more than 2 % of the median apart in {len(noisy)} of {len(timings)} figures.{_beyond(ops)}",
        "",
        "| op | direction, dtype | sizes | faster | even | slower | failed | speed / fastest peer | speed / baseline | share of the limit |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for op, contests in ops.items():
        for kind in kinds(contests):
            lines.append(_summary_row(op, [each for each in contests if each.kind == kind]))
    return lines


def _beyond(ops: dict[str, list[Contest]]) -> str:
    count = sum(
        result.share_of_limit > 1
        for contests in ops.values() for each in contests if each.has_limit for result in each.timed
    )  # fmt: skip
    if not count:
        return ""
    return f" {count} are over 100 % of the limit: it was measured too low, or a cache kept what they moved."


def _summary_row(op: str, contests: list[Contest]) -> str:
    verdicts = [each.verdict for each in contests]
    counts = " | ".join(str(verdicts.count(verdict) or "") for verdict in ("faster", "even", "slower", "failed"))
    timed = [(each, each.ours) for each in contests if each.ours and each.ours.samples]
    cells = [
        [peer.timing.median / ours.timing.median for each, ours in timed if (peer := each.best_peer)],
        [peer.timing.median / ours.timing.median for each, ours in timed if (peer := each.baseline)],
    ]
    ratios = " | ".join(f"{geometric_mean(values):.2f}x" if values else "" for values in cells)
    shares = [ours.share_of_limit for each, ours in timed if each.has_limit]
    share = units.percent(geometric_mean(shares)) if shares else ""
    return f"| {cell(op)} | {', '.join(contests[0].kind)} | {len(contests)} | {counts} | {ratios} | {share} |"


def _losses(ops: dict[str, list[Contest]], profiles: Mapping[str, Profile]) -> list[str]:
    """What is slower than a peer, and what failed."""
    lines = ["**Where llama-fast loses**", ""]
    every = [each for contests in ops.values() for each in contests]
    slower = [(each, each.ours, each.best_peer) for each in every if each.verdict == "slower"]
    rows = [
        (each.op, each.shape, ", ".join(each.kind), ours.timing.median, peer.timing.median, peer.implementation)
        for each, ours, peer in slower if ours and peer
    ]  # fmt: skip
    rows += sections.losses(profiles)
    if rows:
        lines += [
            "| op | shape | direction, dtype | llama-fast | fastest peer | who | time / peer's |",
            "|---|---|---|---:|---:|---|---:|",
        ]
        lines += [
            f"| {cell(op)} | {cell(shape)} | {kind} | {units.duration(ours)} | {units.duration(peer)} | {cell(who)} | {ours / peer:.2f}x |"
            for op, shape, kind, ours, peer, who in sorted(rows, key=lambda row: -row[3] / row[4])
        ]
    failed = [(each, each.ours) for each in every if each.verdict == "failed"]
    lines += [""] if rows and failed else []
    lines += [
        f"- {cell(each.op)}, {cell(each.shape)}, {', '.join(each.kind)}: {cell(ours.failure or '')}"
        for each, ours in failed
        if ours
    ]
    lines += [] if rows or failed else ["Nowhere beyond the noise."]
    unsure = [
        each for each in every
        if each.verdict == "even" and each.ours and each.best_peer
        and each.ours.timing.median >= (1 + MINIMUM_EFFECT) * each.best_peer.timing.median
    ]  # fmt: skip
    if unsure:
        lines += [
            "",
            f"Sizes at which its median is longer by 3 % or more, but within the noise (above they count as even): {len(unsure)}.",
        ]
    return lines


def _tables(contests: list[Contest]) -> list[str]:
    """A table for each direction and dtype, folded: they are long."""
    lines: list[str] = []
    for kind in kinds(contests):
        chosen = [each for each in contests if each.kind == kind]
        baseline = next((each.baseline.implementation for each in chosen if each.baseline), "baseline")
        memory = [each.is_memory_bound for each in chosen]
        lines += [""] if lines else []
        lines += [
            "<details>",
            f"<summary>{', '.join(kind)}: {len(chosen)} size{'' if len(chosen) == 1 else 's'}, bound by "
            f"{'memory' if all(memory) else 'arithmetic' if not any(memory) else 'memory or arithmetic'}</summary>",
            "",
            f"| shape | implementation | median | p20 to p80 | rate | share of the limit | speed / {baseline} | error | its bound | note |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
            *[_row(each, result, first=i == 0) for each in chosen for i, result in enumerate(each.results)],
            "",
            "</details>",
        ]
    return lines


def _row(contest: Contest, result: Result, *, first: bool) -> str:
    shape = cell(contest.shape) if first else ""
    name = f"**{OURS}**" if result.implementation == OURS else cell(result.implementation)
    error, bound = ("" if value is None else f"{value:.1e}" for value in (result.error, result.bound))
    if not result.samples:
        return f"| {shape} | {name} | **no figure** | | | | | {error} | {bound} | {cell(result.failure or '')} |"
    timing, base = result.timing, contest.baseline
    fastest = contest.timed[0] is result and len(contest.timed) > 1
    median = units.duration(timing.median)
    moved, done = 1e9 * result.gigabytes_per_s, 1e12 * result.teraflops
    rate = units.size(moved) if contest.is_memory_bound else units.flops(done)
    share = units.percent(result.share_of_limit) if contest.has_limit else "in cache" if result.floor_s else ""
    ratio = "" if base is None else f"{base.timing.median / timing.median:.2f}x"
    return (
        f"| {shape} | {name} | {f'**{median}**' if fastest else median} | {_range(timing.p20, timing.p80)} "
        f"| {rate}/s | {share} | {ratio} | {error} | {bound} | {cell(result.note or '')} |"
    )


def _range(low: float, high: float) -> str:
    """The unit once, where both have the same."""
    number, unit = units.duration(low).split()
    last = units.duration(high)
    return f"{number} to {last}" if last.endswith(f" {unit}") else f"{number} {unit} to {last}"


def _left_out(device: Device) -> list[str]:
    """Who could not run there, and what the run warned of."""
    skipped: dict[tuple[str, str], list[str]] = {}
    for record in device.only(Record).values():
        for each in record.skipped:
            ops = skipped.setdefault((each.implementation, each.reason), [])
            if each.op not in ops:
                ops.append(each.op)
    lines = [f"- {cell(name)}: {cell(reason)} ({', '.join(ops)})" for (name, reason), ops in skipped.items()]
    said = [record.warnings for record in device.only(Record).values()]
    said += [profile.trust.warnings for profile in device.only(Profile).values()]
    warnings = list(dict.fromkeys(warning for each in said for warning in each))
    if lines:
        lines = ["", f"Not run on {cell(device.name)}:", "", *lines]
    if warnings:
        lines += [
            "",
            "<details>",
            f"<summary>Warnings of the runs on {cell(device.name)}: {len(warnings)}</summary>",
            "",
        ]
        lines += [*(f"- {cell(warning)}" for warning in warnings), "", "</details>"]
    return lines


def _not_measured(
    devices: Sequence[Device], gpus: Sequence[Device], cases: Mapping[str, Iterable[WorkKey]], order: list[str]
) -> list[str]:
    """Ops by hardware: how many of the suite's sizes have a result there."""
    wanted = [name for name in WANTED_GPUS if not any(name in device.name for device in gpus)]
    columns = [(cell(device.name), "cuda" if device.is_gpu else "cpu", _measured_keys(device)) for device in devices]
    columns += [(name, "cuda", set()) for name in wanted]
    if not any(kind == "cpu" for _, kind, _ in columns):
        columns.append(("a CPU", "cpu", set()))
    lines = [
        "## What has not been measured",
        "",
        "Sizes at which llama-fast has a figure, of those that the suite has for such a device (`llama-fast bench` without `--quick`).",
        "",
        f"| op | {' | '.join(name for name, _, _ in columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for op in order:
        cells = []
        for _, kind, measured in columns:
            all_keys = {key for key in cases[kind] if key[0] == op}
            cells.append(f"{len(all_keys & measured)} of {len(all_keys)}" if all_keys else "no such case")
        lines.append(f"| {op} | {' | '.join(cells)} |")
    nothing = [name for name, _, measured in columns if not measured]
    if nothing:
        lines += ["", f"Nothing at all has been measured on: {', '.join(nothing)}."]
    return lines


def _measured_keys(device: Device) -> set[WorkKey]:
    return {
        each.results[0].work_key for each in device.contests
        if each.ours and each.ours.samples
    }  # fmt: skip
