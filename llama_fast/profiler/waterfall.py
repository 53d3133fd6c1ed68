"""A latency as a sum: what was measured on its own is a part, and what that leaves is the last part, "rest"."""

from collections.abc import Iterable, Mapping, Sequence

from .phases import AFTER
from .result import KINDS, Kernel, Part, Waterfall

FORWARD = "forward"
OUTSIDE = {"sampling", "read-back", "inputs", "generate"}
"""Where ops are that lie in a phase of their own: the phase is the part."""

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


def kernel_parts(kernels: Iterable[Kernel], floor_note: str = "") -> list[Part]:
    """The floor of all, and what each part of the model takes beyond its own. No kernel's floor counts for more than it took."""
    floor = 0.0
    beyond: dict[str, float] = {}
    for kernel in kernels:
        least = min(kernel.floor, kernel.seconds)
        floor += least
        beyond[kernel.where] = beyond.get(kernel.where, 0.0) + kernel.seconds - least
    longest_first = sorted(beyond.items(), key=lambda item: -item[1])
    return [Part("floor", floor, "floor", floor_note)] + [
        Part(where, seconds, "inefficiency") for where, seconds in longest_first
    ]


def host_waterfall(
    measured: float, phases: Mapping[str, float], kernels: Sequence[Kernel], *, floor_note: str = ""
) -> Waterfall:
    """On a CPU: the phases of the same steps fill the latency; the operators inside "forward" were timed apart."""
    computing = [kernel for kernel in kernels if kernel.where not in OUTSIDE]
    parts = kernel_parts(computing, floor_note) if FORWARD in phases else []
    forward, operators = phases.get(FORWARD, 0.0), sum(part.seconds for part in parts)
    parts.append(Part("between operators", max(0.0, forward - operators), "gap", "Python between the operators"))
    return whole(measured, parts + phase_parts(phases))


def phase_parts(phases: Mapping[str, float]) -> list[Part]:
    """Those beside the forward pass."""
    known = {name: _PHASES.get(name, (name, "host")) for name in phases if name != FORWARD}
    return [Part(called, phases[name], kind) for name, (called, kind) in known.items()]


def gpu_token(
    measured: float, kernels: Sequence[Kernel], *, gaps: float, idle_copies: float, span: float, phases: Mapping[str, float],
    floor_note: str = "",
) -> Waterfall:  # fmt: skip
    """On a GPU: the period of a steady step, from the device's view. What the host does meanwhile is hidden behind it.

    Args:
        kernels: of a step.
        gaps: between them, as they were traced.
        idle_copies: of copies between the steps.
        span: of a step's replay by events, without a tracer; 0 where there is no replay. A tracer makes gaps longer, never shorter.
        phases: of the host in a step.
    """
    computing = [kernel for kernel in kernels if kernel.where not in OUTSIDE]
    sampling = sum(kernel.seconds for kernel in kernels if kernel.where in OUTSIDE)
    parts = [*kernel_parts(computing, floor_note), Part("sampling", sampling, "sampling")]
    busy = sum(part.seconds for part in parts)
    gaps = max(0.0, min(gaps, (span or measured) - busy))
    parts += [Part("gaps between kernels", gaps, "gap"), Part("copies", idle_copies, "read-back")]
    if span:
        between = max(0.0, measured - max(span, busy + gaps) - idle_copies)
        parts.append(Part("GPU idle between steps", between, "host", "the host was not there in time"))
        return whole(measured, parts, _hidden(phases))
    idle = max(0.0, measured - busy - gaps - idle_copies)
    host = {
        name: seconds for name, seconds in phases.items() if name in ("text", "read", "schedule", AFTER, "generate")
    }
    for part in phase_parts(host):  # while the host does these, nothing is launched
        seconds = min(part.seconds, idle)
        parts.append(Part(part.name, seconds, part.kind))
        idle -= seconds
    return whole(measured, parts, _hidden({n: s for n, s in phases.items() if n not in host}))


def _hidden(phases: Mapping[str, float]) -> list[Part]:
    forward = [Part("launching", phases[FORWARD], "host")] if phases.get(FORWARD) else []
    return forward + [part for part in phase_parts(phases) if part.name != "wait for the GPU" and part.seconds]


def gpu_first_token(
    measured: float, kernels: Sequence[Kernel], *, gaps: float, before: float, phases: Mapping[str, float],
    floor_note: str = "",
) -> Waterfall:  # fmt: skip
    """The prompt on a GPU: the host until the first launch, the GPU's work, and the host after the last kernel.

    Args:
        before: host seconds until the first kernel began, that no phase below names.
    """
    computing = [kernel for kernel in kernels if kernel.where not in OUTSIDE]
    sampling = sum(kernel.seconds for kernel in kernels if kernel.where in OUTSIDE)
    named = {name: phases[name] for name in ("tokenise", "submit", "read", "text", AFTER) if name in phases}
    parts = [*kernel_parts(computing, floor_note), Part("sampling", sampling, "sampling"), *phase_parts(named)]
    left = measured - sum(part.seconds for part in parts)
    for name, seconds, kind in (("until the first launch", before, "host"), ("gaps between kernels", gaps, "gap")):
        seconds = max(0.0, min(seconds, left))
        parts.append(Part(name, seconds, kind, "at most as traced: a tracer makes them longer"))
        left -= seconds
    return whole(measured, parts, _hidden({n: s for n, s in phases.items() if n not in named}))
