"""A decoding step over the length of the context, and with one fusion off at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

from ...decoder.model import Fusions
from ...engine.llm import LLM
from ..result import Ablation, ContextPoint, Distribution
from .latency import Rounds, watched
from .limits import Limits
from .sides import EngineSide, Side
from .subject import Subject
from .work import decoding_step_work, weight_elements

_TOKENS = 9  # generated at each context; the first of them is the prompt's
_ROUNDS = 3

Tick = Callable[[str], None]


def context_points(subject: Subject, limits: Limits, tick: Tick) -> list[ContextPoint]:
    """Measured where it fits; computed also at powers of two up to the longest context that the model was made for."""
    if subject.config is None:
        return []
    measured = subject.measured_contexts
    points = []
    for context in sorted(measured):  # a static cache of transformers keeps the longest length that it ever had
        tick(f"a decoding step at {context} tokens")
        found = _steps_at(subject, context)
        points += [
            _point(subject, limits, side, context, found[side.name]) for side in subject.sides if side.name in found
        ]
    longest = subject.config.max_positions
    powers = [1 << i for i in range(6, longest.bit_length()) if 1 << i <= longest]
    rest = sorted({*powers, longest, *subject.sizes.contexts} - set(measured))
    points += [_point(subject, limits, subject.sides[0], context, None) for context in rest]
    return sorted(points, key=lambda point: point.context)


def _steps_at(subject: Subject, context: int) -> dict[str, Distribution]:
    """Seconds of the steps that attend to the last few keys up to `context`, the sides in turns; the first round is a warm-up.

    After it our engine knows the prompts: all rows begin to decode in the same step, however many steps the prompts have taken.
    """
    tokens = min(_TOKENS, context)
    prompt = max(1, context - tokens + 1)  # the last step attends to the prompt and all tokens but the one it makes
    prompts, _ = subject.prompts(subject.sizes.batch[0], prompt)
    rounds = [Rounds(side) for side in subject.sides]
    for i in range(_ROUNDS + 1):
        for each in list(rounds):
            try:
                generation, phases = watched(each.side, prompts, context - prompt + 1, reuse=True)
            except RuntimeError as error:
                subject.leave_out(each.side, error)
                rounds.remove(each)
                continue
            if i:
                each.generations.append(generation)
                each.phases.append(phases)
    return {each.side.name: Distribution(tuple(each.gaps)) for each in rounds if each.gaps}


def _point(subject: Subject, limits: Limits, side: Side, context: int, measured: Distribution | None) -> ContextPoint:
    config, batch = subject.config, subject.sizes.batch[0]
    assert config is not None
    cache_dtype = subject.cache_dtype_of(side)
    work = decoding_step_work(config, batch, context, subject.dtype, cache_dtype=cache_dtype)
    weights = weight_elements(config)[0] * subject.dtype.itemsize
    keys = sum(min(context, window or context) for window in config.windows)
    kv_bytes = batch * keys * 2 * config.num_kv_heads * config.head_dim * cache_dtype.itemsize
    return ContextPoint(side.name, context, batch, weights, kv_bytes, limits.floor_s(work, subject.dtype), measured)


def ablations(subject: Subject, tick: Tick) -> list[Ablation]:
    """Each fusion of our engine that is on, off in turn. Both ways in the same rounds, over the same weights."""
    side = subject.sides[0]
    if not isinstance(side, EngineSide):
        return []
    found = []
    for name, off in _variants(side.llm):
        tick(f"without the fusion {name}")
        found.append(_ablation(subject, side.llm, name, off))
    return found


def _variants(llm: LLM) -> Iterator[tuple[str, Fusions]]:
    """Those that are on and of effect. A CPU's recording holds no PyTorch op, which adds the residual where that is not fused."""
    now, without = llm.decoder.fusions, set[str]()
    if llm.device.type == "cpu":
        without = {"dependent_launch"} if llm._core.runner.steps is None else {"dependent_launch", "residual"}
    for each in fields(Fusions):
        if getattr(now, each.name) and each.name not in without:
            yield each.name, replace(now, **{each.name: False})


def _ablation(subject: Subject, llm: LLM, name: str, off: Fusions) -> Ablation:
    sizes, on = subject.sizes, llm.decoder.fusions
    tokens = min(sizes.new_tokens, 33)
    prompts, _ = subject.prompts(sizes.batch[0], sizes.prompt_tokens)
    side: Side = subject.sides[0]
    gaps: dict[Fusions, list[float]] = {on: [], off: []}
    try:
        for i in range(sizes.rounds + 1):
            order: Sequence[Fusions] = (on, off) if i % 2 else (off, on)
            for fusions in order:
                llm.use_fusions(fusions)
                generation, _ = watched(side, prompts, tokens, reuse=True)
                if i:  # the first of each captures and warms up
                    gaps[fusions] += [b - a for a, b in zip(generation.times, generation.times[1:], strict=False)]
    finally:
        llm.use_fusions(on)
    return Ablation(name, Distribution(tuple(gaps[on])), Distribution(tuple(gaps[off])))
