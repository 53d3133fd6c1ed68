"""What the terminal and the page both show of a profile: runs by setting, ranked kernels, steps of a waterfall, the crossover."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from ...reports.units import column, flops, number, percent, size
from ..attribute.kernels import VIEWS
from ..measure.limits import Limits
from ..measure.work import Work
from ..result import Ablation, ContextPoint, Distribution, Kernel, Latency, Part, Profile, Run, Waterfall
from ..significance import Difference, difference, difference_in_turns

KIND_NAMES = {
    "floor": "floor", "inefficiency": "above the floor", "gap": "gaps", "host": "host",
    "sampling": "sampling", "read-back": "read-back", "text": "text", "compile": "compile, capture",
    "rest": "not attributed",
}  # fmt: skip
"""Of `result.KINDS`, for a legend."""


def title(profile: Profile) -> str:
    return f"{profile.model}, {profile.dtype}, on {profile.machine.get('gpu') or profile.machine.get('processor') or profile.device}"


def settings(profile: Profile) -> list[list[Run]]:
    """Runs at the same setting together: the subject's first, then what it is set against."""
    groups: dict[tuple[int, int, int], list[Run]] = {}
    for run in profile.runs:
        groups.setdefault((run.prompt_tokens, run.new_tokens, run.batch), []).append(run)
    return list(groups.values())


def setting_name(run: Run) -> str:
    return f"{run.prompt_tokens:,} prompt tokens, {run.new_tokens:,} new, batch {run.batch}"


BUSY = "The machine was too busy: the parts below are not to be believed."


def is_disturbed(profile: Profile) -> bool:
    """Whether other work spoiled any of its runs."""
    return any(run.is_disturbed for run in profile.runs)


def doubt(run: Run) -> str:
    """For the titles of what a busy machine spoils; empty on a quiet one."""
    return " (not to be believed: the machine was busy)" if run.is_disturbed else ""


def metrics(latency: Latency) -> dict[str, Distribution]:
    """By the names of vLLM's benchmarks."""
    return {"TTFT": latency.ttft, "ITL": latency.itl, "TPOT": latency.tpot, "E2EL": latency.e2el}


def computed_by(profile: Profile) -> str:
    """What a step of the subject is made of: "kernels", or "operators" where all are PyTorch's on a CPU."""
    names = {kernel.name for kernel in profile.runs[0].kernels} - {VIEWS}
    return "kernels" if profile.machine.get("gpu") or not all("::" in name for name in names) else "operators"


METRIC_NAMES = {
    "TTFT": "time to first token", "ITL": "inter-token latency", "TPOT": "time per output token",
    "E2EL": "end-to-end latency",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A part of a waterfall as it is drawn.

    Attributes:
        start, end: as shares of the chart's width; end < start where the part is negative.
        figure: the seconds in the chart's unit; what is printed of all parts adds up to what is printed of the whole.
        share: of the latency.
    """

    part: Part
    start: float
    end: float
    figure: str
    share: float

    @property
    def left(self) -> float:
        return min(self.start, self.end)

    @property
    def width(self) -> float:
        return abs(self.end - self.start)


@dataclass(frozen=True)
class Steps:
    """A waterfall as it is drawn: each part starts where the one before ended."""

    unit: str
    total: str
    width: float
    """Of the whole, as a share of the chart's."""
    steps: list[Step]


def steps(waterfall: Waterfall) -> Steps:
    """The chart is as wide as the parts need."""
    ends = list(accumulate(part.seconds for part in waterfall.parts))
    scale = max([waterfall.measured, *ends])
    unit, total, figures = column(waterfall.measured, [part.seconds for part in waterfall.parts])
    return Steps(unit, total, waterfall.measured / scale, [
        Step(part, start / scale, end / scale, figure, part.seconds / waterfall.measured)
        for part, start, end, figure in zip(waterfall.parts, [0.0, *ends], ends, figures, strict=False)
    ])  # fmt: skip


def short(name: str, length: int = 20) -> str:
    """A kernel's name without the C++ that nobody reads."""
    name = name.removeprefix("void ").partition("<")[0].rpartition("::")[2].strip("_")
    return name if len(name) <= length else name[: length - 1] + "…"


def ranked(kernels: Sequence[Kernel]) -> list[Kernel]:
    """By what could still be won."""
    return sorted(kernels, key=lambda kernel: (-kernel.winnable, -kernel.seconds))


@dataclass(frozen=True)
class Rate:
    """How a kernel stands to the limit that binds it: `text` is GB/s or TFLOP/s, empty where its work is not known."""

    text: str
    binds: str
    share: str


def rate(kernel: Kernel, limits: Limits) -> Rate:
    """The rate of what binds: bytes, unless the FLOPs take longer."""
    if not kernel.floor or not kernel.seconds:
        return Rate("", "", "")
    share = percent(kernel.share_of_limit)
    moved = Work(kernel.read, kernel.written)
    if kernel.floor > 1.01 * limits.memory_floor_s(moved):
        return Rate(f"{flops(kernel.flops / kernel.seconds)}/s", "compute", share)
    return Rate(f"{size(moved.bytes / kernel.seconds)}/s", "memory", share)


def crossover(points: Sequence[ContextPoint]) -> float | None:
    """The context at which keys and values weigh as much as the weights, on lines through the points; None: never."""
    points = sorted(points, key=lambda point: point.context)
    excess = [(0, -point.weight_bytes) for point in points[:1]]
    excess += [(point.context, point.kv_bytes - point.weight_bytes) for point in points]
    lines = list(pairwise(excess))
    (x0, y0), (x1, y1) = next((line for line in lines if line[1][1] >= 0), lines[-1])
    return x0 - y0 * (x1 - x0) / (y1 - y0) if y1 > y0 else None  # under a sliding window the cache grows no more


def crossover_lines(points: Sequence[ContextPoint]) -> list[str]:
    """A sentence for each batch of the subject's."""
    subject = points[0].side
    lines = []
    for batch in dict.fromkeys(point.batch for point in points if point.side == subject):
        at = crossover([point for point in points if (point.side, point.batch) == (subject, batch)])
        where = f"from {number(at)} tokens of context on" if at else "at no context"
        lines.append(f"batch {batch}: keys and values outweigh the weights {where}")
    return lines


def sides(points: Sequence[ContextPoint]) -> list[tuple[str, int]]:
    """Sides and batches in the order they come."""
    return list(dict.fromkeys((point.side, point.batch) for point in points))


@dataclass(frozen=True)
class FusionGain:
    """What a fusion gains a token, and whether that is beyond the noise."""

    ablation: Ablation
    change: Difference

    @property
    def verdict(self) -> str:
        if not self.change.is_significant:
            return "no difference"
        return "gains" if self.ablation.gain > 0 else "LOSES"


def fusion_gains(profile: Profile) -> list[FusionGain]:
    """The largest gain first. A gain of a tenth of a percent is one, if it is sure."""
    count = len(profile.ablations)
    gains = [
        FusionGain(each, difference(each.on.samples, each.off.samples, minimum=0.001, comparisons=count))
        for each in profile.ablations
    ]
    return sorted(gains, key=lambda gain: -gain.ablation.gain)


def versus(run: Run, subject: Run, metric: str) -> str:
    """How the side's median stands to the subject's: "3.1x"."""
    return f"{number(metrics(run.latency)[metric].median / metrics(subject.latency)[metric].median)}x"


def verdict(run: Run, subject: Run, metric: str) -> str:
    """Whether the side is "faster" or "slower" than the subject beyond the noise, or "as fast"."""
    found = difference_in_turns(metrics(subject.latency)[metric].samples, metrics(run.latency)[metric].samples)
    return "faster" if found.is_faster else "slower" if found.is_slower else "as fast"


def facts(profile: Profile) -> list[tuple[str, str, bool | None]]:
    """The trust block: what was checked, what came out, and whether it is as it should be (None: a fact, no check)."""
    trust = profile.trust
    found: list[tuple[str, str, bool | None]] = []
    if trust.logit_errors:
        errors = ", ".join(f"{side} {error:.1e}" for side, error in trust.logit_errors.items())
        found.append(("logits against float64, relative RMS error", errors, trust.logits_pass))
    if trust.largest_logit_errors:
        errors = ", ".join(f"{side} {error:.1e}" for side, error in trust.largest_logit_errors.items())
        found.append(("largest logit error", errors, None))
    if trust.common_tokens is not None:
        same = f"{trust.common_tokens} of {trust.tokens} tokens"
        found.append(("greedy agreement with transformers", same, None))
    waited = [(run, run.waited) for run in profile.runs if run.waited is not None]
    shares = ", ".join(f"{run.side}, batch {run.batch}: {percent(share)}" for run, share in waited)
    quiet = not any(run.is_disturbed for run, _ in waited) if waited else None
    found.append(("time that it waited for a CPU that other work had", shares or "not known on this system", quiet))
    found.append(("two runs give the same bits", "yes" if trust.same_bits else "no", trust.same_bits))
    steady = f"first and last quarter of the tokens {'agree within' if trust.warm else 'differ by more than'} 5 %"
    found.append(("warm", f"{'yes' if trust.warm else 'no'}: {steady}", trust.warm))
    for name in trust.before | trust.after:
        found.append((name, f"{trust.before.get(name, '?')} before, {trust.after.get(name, '?')} after", None))
    ledger = ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in trust.memory.items() if count)
    if ledger:
        found.append(("memory", ledger, None))
    return found


def limit_rows(limits: Limits) -> list[tuple[str, str]]:
    """The measured limits of the machine."""
    rows = [
        ("read stream", f"{size(limits.read_bytes_per_s)}/s"), ("copy", f"{size(limits.copy_bytes_per_s)}/s"),
        *((f"matmul {dtype}", f"{flops(r)}/s") for dtype, r in limits.matmul_flops_per_s.items()),
        ("launch", f"{number(1e6 * limits.launch_s)} µs"),
    ]  # fmt: skip
    if limits.graph_node_s is not None:
        rows.append(("graph node", f"{number(1e6 * limits.graph_node_s)} µs"))
    return [*rows, ("last cache", size(limits.cache_bytes))]


def token_floor(run: Run) -> float:
    """What a token's waterfall calls floor."""
    return sum(part.seconds for part in run.token.parts if part.kind == "floor")


def kinds(runs: Sequence[Run]) -> list[str]:
    """Those that occur, in the order of KIND_NAMES."""
    there = {part.kind for run in runs for part in [*run.token.parts, *run.first_token.parts]}
    return [kind for kind in KIND_NAMES if kind in there]


def machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """A profile's `machine`, on one level."""
    rows: list[tuple[str, str]] = []
    for name, value in machine.items():
        rows += machine_rows(value) if isinstance(value, dict) else [(name, "unknown" if value is None else str(value))]
    return rows
