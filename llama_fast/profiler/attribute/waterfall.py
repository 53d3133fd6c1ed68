"""A latency as a sum: what was measured on its own is a part, and what that leaves is the last part, "rest"."""

import math
from collections.abc import Iterable, Mapping, Sequence

from ..measure.phases import AFTER
from ..result import KINDS, Kernel, Part, Waterfall
from .counting import FORWARD, WHERE
from .kernels import NOT_ATTRIBUTED

NEEDLESS = "more than the model asks for"
BETWEEN_OPERATORS = "between operators", "Python between the operators"
AROUND_REPLAY = "call of the replay", "into the native call that replays the step, and out of it"
_ROUNDING = 1e-9
OUTSIDE = {"sampling": "sampling", "read-back": "read-back", "inputs": "host", "generate": "host"}
"""Where ops are that lie in a phase of their own, and its kind."""

# name of a phase: what it is called, and its kind
_PHASES = {
    "tokenise": ("tokenise", "text"),
    "submit": ("queue the request", "host"),
    "schedule": ("schedule", "host"),
    "inputs": ("inputs of the step", "host"),
    "sample": ("sampling", "sampling"),
    "read": ("read back", "read-back"),
    "text": ("detokenise", "text"),
    "generate": ("generate around the model", "host"),
    "step": ("step", "host"),
    "launch": ("launch", "host"),
    "wait": ("wait for the GPU", "host"),
    AFTER: ("between steps", "host"),
}


def whole(measured: float, parts: Iterable[Part], hidden: Sequence[Part] = ()) -> Waterfall:
    """The parts that are not zero, by kind, and the rest of `measured`."""
    kept = sorted((part for part in parts if part.seconds), key=lambda part: KINDS.index(part.kind))
    rest = measured - sum(part.seconds for part in kept)
    return Waterfall(measured, [*kept, Part("rest", rest, "rest", "measured apart from the latency")], list(hidden))


def kernel_parts(kernels: Iterable[Kernel], floor_note: str = "", least: float | None = None) -> list[Part]:
    """The floor of all, and what each part of the model takes beyond its own. No kernel's floor counts for more than it took.

    What lies outside of the forward pass is a part of its own. `least` is the floor of what the model must do: what kernels must do
    together beyond that (copies of a cache, tensors between ops) is no floor, and what is not attributed has what the others leave of it.
    """
    seconds: dict[str, float] = {}
    floors: dict[str, float] = {}
    for kernel in kernels:
        seconds[kernel.where] = seconds.get(kernel.where, 0.0) + kernel.seconds
        floors[kernel.where] = floors.get(kernel.where, 0.0) + min(kernel.floor, kernel.seconds)
    outside = [Part(where, took, OUTSIDE[where]) for where, took in seconds.items() if where in OUTSIDE]
    inside = [where for where in seconds if where not in OUTSIDE]
    if least is not None and NOT_ATTRIBUTED in seconds:
        others = sum(floors[where] for where in inside if where != NOT_ATTRIBUTED)
        floors[NOT_ATTRIBUTED] = min(max(0.0, least - others), seconds[NOT_ATTRIBUTED])
    together = sum(floors[where] for where in inside)
    floor = together if least is None else min(together, least)
    beyond = [Part(where, seconds[where] - floors[where], "inefficiency") for where in inside]
    if together - floor > _ROUNDING:
        note = "at the measured rates: tensors between ops, copies of the cache, work done twice"
        beyond.append(Part(NEEDLESS, together - floor, "inefficiency", note))
    return [Part("floor", floor, "floor", floor_note), *sorted(beyond, key=lambda part: -part.seconds), *outside]


def host_waterfall(
    measured: float, phases: Mapping[str, float], kernels: Sequence[Kernel], *, gaps: float = math.inf,
    gaps_are: tuple[str, str] = BETWEEN_OPERATORS, floor_note: str = "", least: float | None = None,
) -> Waterfall:  # fmt: skip
    """On a CPU: the phases of the same steps fill the latency; the operators or launches inside "forward" were timed apart.

    Args:
        gaps: between these, as they were timed. The clock makes them longer, never shorter; infinite where it is not known.
        gaps_are: their name and note.
        least: the floor of what the model must do.
    """
    told = {WHERE.get(name) for name in phases}  # a replay may hold the choice of the token: then no phase does
    computing = [kernel for kernel in kernels if kernel.where not in told]
    parts = kernel_parts(computing, floor_note, least) if FORWARD in phases else []
    name, note = gaps_are
    between = max(0.0, min(gaps, phases.get(FORWARD, 0.0) - sum(part.seconds for part in parts)))
    parts.append(Part(name, between, "gap", note))
    return whole(measured, parts + phase_parts(phases))


def phase_parts(phases: Mapping[str, float]) -> list[Part]:
    """Those beside the forward pass."""
    known = {name: _PHASES.get(name, (name, "host")) for name in phases if name != FORWARD}
    return [Part(called, phases[name], kind) for name, (called, kind) in known.items()]


def gpu_token(
    measured: float, kernels: Sequence[Kernel], *, gaps: float, copies: float = 0.0, span: float = 0.0,
    between: float = math.inf, phases: Mapping[str, float], floor_note: str = "", least: float | None = None,
) -> Waterfall:  # fmt: skip
    """On a GPU: the period of a steady step, as the device sees it. What the host does meanwhile is hidden behind it.

    Args:
        kernels: of a step.
        gaps: between them, as they were traced. A tracer makes them longer, never shorter.
        copies: between the replays of two steps.
        span: of a replay, by events and without a tracer; 0 where nothing is replayed.
        between: from the last kernel of a step to the first of the next, without the copies, as traced; infinite where it is not known.
        phases: of the host in a step.
        least: the floor of what the model must do in a step.
    """
    parts = [*kernel_parts(kernels, floor_note, least), Part("copies", copies, "read-back", "inputs in, tokens out")]
    busy = sum(part.seconds for part in parts) - copies
    inside = max(0.0, min(gaps, (span or measured - copies) - busy))
    idle = max(0.0, min(between, measured - copies - max(span, busy + inside)))
    parts += [
        Part("gaps between kernels", inside, "gap"),
        Part("GPU idle between steps", idle, "host", "the host was not there in time"),
    ]
    return whole(measured, parts, hidden_parts(phases))


def gpu_first_token(
    measured: float, kernels: Sequence[Kernel], *, gaps: float, until_first: float, phases: Mapping[str, float],
    floor_note: str = "", least: float | None = None,
) -> Waterfall:  # fmt: skip
    """The prompt on a GPU: the host until the first kernel, the GPU's work, and the host after the last one.

    Args:
        gaps, until_first: as they were traced, without a text to encode: between the kernels, and from the request to the first.
        phases: of the host: those that come before any launch, or after the last kernel, are parts of their own.
    """
    alone = {name: phases[name] for name in ("tokenise", "submit", "read", "text", AFTER) if name in phases}
    parts = [*kernel_parts(kernels, floor_note, least), *phase_parts(alone)]
    left = measured - sum(part.seconds for part in parts)
    for name, seconds, kind in (
        ("until the first launch", until_first - alone.get("submit", 0.0), "host"),
        ("gaps between kernels", gaps, "gap"),
    ):
        seconds = max(0.0, min(seconds, left))
        parts.append(Part(name, seconds, kind, "at most as traced: a tracer makes it longer"))
        left -= seconds
    return whole(measured, parts, hidden_parts({n: s for n, s in phases.items() if n not in alone}))


def hidden_parts(phases: Mapping[str, float]) -> list[Part]:
    """What the host does while the GPU is busy; waiting is no work."""
    forward = [Part("launch the forward pass", phases[FORWARD], "host")] if phases.get(FORWARD) else []
    return forward + [part for part in phase_parts(phases) if part.seconds and part.name != _PHASES["wait"][0]]
