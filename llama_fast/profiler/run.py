"""`llama_fast.profile`: everything that a profile holds, measured."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.llm import LLM
from .attribute.kernels import Entry, table
from .attribute.on_cpu import Operators
from .attribute.on_gpu import steps_on_gpu
from .attribute.trace import write_trace
from .attribute.waterfall import AROUND_REPLAY, BETWEEN_OPERATORS, gpu_first_token, gpu_token, host_waterfall
from .machine import gpu_state, machine
from .measure.contexts import Tick, ablations, context_points
from .measure.latency import Rounds, run_rounds
from .measure.limits import Limits, measure_limits
from .measure.phases import typical
from .measure.quiet import mean_share
from .measure.sides import Side
from .measure.subject import Subject, first_line, open_subject
from .measure.trust import trust
from .measure.work import decoding_step_work, prompt_work
from .result import Kernel, Latency, Part, Profile, Run, Waterfall

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRACED = 8
_MOST_REST = 0.1
_FLOOR = "what each {} must read, write and multiply, at the measured rates; none counts for more than it took, nor all for more than the model asks for"


def profile(
    model: "LLM | PreTrainedModel | str | Path | None" = None, *, prompt_tokens: int | None = None,
    new_tokens: int | None = None, batch: Sequence[int] = (1,), contexts: Sequence[int] | None = None,
    against: Sequence[str] = (), dtype: str | torch.dtype = "auto", device: str | torch.device = "auto", rounds: int = 5,
    ablate: bool = True, trace: str | Path | None = None, progress: Callable[[str], None] | None = None,
) -> Profile:  # fmt: skip
    """Measures where the time of a generated token goes, and how far it is from what the machine can do.

    Args:
        model: a folder, a .gguf file or a name on the Hugging Face hub, which our engine runs; an `LLM`; a model of
            transformers, fused or not; None: the small model inside the package.
        prompt_tokens, new_tokens: of a request; None: 512 and 128, or what a shorter context leaves.
        batch: numbers of requests that arrive together; each is a setting of its own.
        contexts: lengths at which a decoding step is measured; None: three within a request; (): none. What must be read is also
            computed at others.
        against: what else is measured at the same settings, in turns: "transformers", "transformers-fused" and, on a GPU,
            "transformers-static" (static cache, compiled).
        dtype, device: as `LLM` takes them, of a model that is loaded here.
        rounds: requests of each side that are timed at each setting, after a warm-up.
        ablate: also switch each fusion of our engine off in turn.
        trace: where to write a Chrome trace of a few tokens.
        progress: is told what is being measured.

    Raises:
        ValueError: an argument is unknown, or does not fit the model, the device or the other arguments.
        ImportError: `against` needs transformers, and it is not installed.
    """
    tick = progress or (lambda _: None)
    given = dict(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, contexts=contexts, rounds=rounds)
    tick("loading")
    subject = open_subject(model, against=against, dtype=dtype, device=device, sizes=given)
    tick("limits of the machine")
    limits = measure_limits(subject.device, quick=subject.device.type == "cpu")
    sizes, before = subject.sizes, gpu_state(subject.device) if subject.device.type == "cuda" else {}
    settings = [_timed(subject, rows, tick) for rows in sizes.batch]
    after = gpu_state(subject.device) if subject.device.type == "cuda" else {}
    runs = [
        _run(subject, limits, prompts, each, operators, tick)
        for prompts, timed, operators in settings
        for each in timed
    ]
    points = context_points(subject, limits, tick)
    switched = ablations(subject, tick) if ablate else []
    if trace is not None:
        tick("a trace")
        prompts = settings[0][0]
        write_trace(lambda: subject.sides[0].generate(prompts, min(sizes.new_tokens, _TRACED)), subject.device, trace)
    tick("logits against float64")
    prompts, timed, _ = settings[0]
    evidence = trust(
        subject, timed, prompts, before=before, after=after, command=_command(subject, model, against, dtype, device)
    )  # fmt: skip
    evidence.warnings[:0] = _disturbed(runs)
    evidence.warnings.extend(_what_is_left(runs))
    return Profile(
        subject.name, str(subject.dtype).removeprefix("torch."), str(subject.device), machine(subject.device), limits, runs,
        points, switched, evidence,
    )  # fmt: skip


def _timed(subject: Subject, batch: int, tick: Tick) -> tuple[Tensor, list[Rounds], dict[str, Operators]]:
    """The rounds of all sides at one setting; on a CPU also their operators."""
    sizes = subject.sizes
    operators: dict[str, Operators] = {}
    prompts, texts = subject.prompts(batch, sizes.prompt_tokens)

    def time_operators(rounds: Rounds) -> None:
        name = rounds.side.name
        if name not in operators:
            operators[name] = Operators(rounds.side, prompts, sizes.new_tokens, repeats=sizes.rounds)
        operators[name].time()

    after_round: Any = {"after_round": time_operators} if subject.device.type == "cpu" else {}
    return (
        prompts,
        run_rounds(
            list(subject.sides),
            prompts,
            texts,
            sizes.new_tokens,
            sizes.rounds,
            tick=tick,
            on_failure=subject.leave_out,
            **after_round,
        ),
        operators,
    )


def _run(
    subject: Subject, limits: Limits, prompts: Tensor, rounds: Rounds, operators: dict[str, Operators], tick: Tick
) -> Run:  # fmt: skip
    tick(f"{rounds.side.name}: where a token's time goes")
    sizes, latency = subject.sizes, rounds.latency(len(prompts))
    if subject.device.type == "cuda":
        try:
            first_token, token, kernels, prompt_kernels = _on_gpu(subject, limits, prompts, rounds)
        except RuntimeError as error:  # of CUDA, or the tracer: what was measured without it is worth as much as before
            where = f"{rounds.side.name}, batch {len(prompts)}"
            subject.warnings.append(f"{where}: its kernels were not traced: {first_line(error)}")
            first_token, token, kernels, prompt_kernels = _host_only(latency, rounds)
    else:
        least = _least(subject, limits, rounds.side, len(prompts))
        first_token, token, kernels, prompt_kernels = _on_cpu(limits, rounds, operators[rounds.side.name], *least)
    of_operators = operators[rounds.side.name].waited if rounds.side.name in operators else []
    waited = [share for each in (rounds.waited, of_operators) if (share := mean_share(each)) is not None]
    cold = latency.cold_ttft - latency.ttft.median
    if cold > 0:
        note = "the first request only, and in no sum"
        first_token.hidden.append(Part("compile, capture, warm up", cold, "compile", note))
    return Run(
        rounds.side.name, sizes.prompt_tokens, sizes.new_tokens, len(prompts), latency, first_token, token, kernels,
        prompt_kernels, max(waited, default=None),
    )  # fmt: skip


Attributed = tuple[Waterfall, Waterfall, list[Kernel], list[Kernel]]


def _on_cpu(
    limits: Limits, rounds: Rounds, operators: Operators, least_prompt: float | None, least: float | None
) -> Attributed:
    prompt_kernels, kernels = table(operators.prompt, limits), table(operators.decoding, limits)
    latency = rounds.latency(1)
    of_tokens, gaps_are = ("kernel", AROUND_REPLAY) if operators.replays else ("operator", BETWEEN_OPERATORS)
    first = host_waterfall(
        latency.ttft.median, typical(rounds.first), prompt_kernels, gaps=_gaps(operators.prompt),
        floor_note=_FLOOR.format("operator"), least=least_prompt,
    )  # fmt: skip
    token = host_waterfall(
        latency.itl.median, typical(rounds.decoding), kernels, gaps=_gaps(operators.decoding), gaps_are=gaps_are,
        floor_note=_FLOOR.format(of_tokens), least=least,
    )  # fmt: skip
    return first, token, kernels, prompt_kernels


def _on_gpu(subject: Subject, limits: Limits, prompts: Tensor, rounds: Rounds) -> Attributed:
    steps = steps_on_gpu(rounds.side, prompts, subject.sizes.new_tokens)
    prompt_kernels, kernels = table(steps.prompt, limits), table(steps.decoding, limits)
    latency, note = rounds.latency(len(prompts)), _FLOOR.format("kernel")
    least_prompt, least = _least(subject, limits, rounds.side, len(prompts))
    if not kernels:
        subject.warnings.append(f"{rounds.side.name}, batch {len(prompts)}: the tracer saw no kernel on the GPU")
        return _host_only(latency, rounds)
    first = gpu_first_token(
        latency.ttft.median, prompt_kernels, gaps=_gaps(steps.prompt), until_first=steps.until_first,
        phases=typical(rounds.first), floor_note=note, least=least_prompt,
    )  # fmt: skip
    token = gpu_token(
        latency.itl.median, kernels, gaps=_gaps(steps.decoding), copies=steps.copies, span=steps.span,
        between=steps.between, phases=typical(rounds.decoding), floor_note=note, least=least,
    )  # fmt: skip
    return first, token, kernels, prompt_kernels


def _host_only(latency: Latency, rounds: Rounds) -> Attributed:
    first = host_waterfall(latency.ttft.median, typical(rounds.first), [])
    return first, host_waterfall(latency.itl.median, typical(rounds.decoding), []), [], []


def _gaps(steps: Sequence[Sequence[Entry]]) -> float:
    of_steps = sorted(sum(entry.gap for entry in step) for step in steps)
    return of_steps[len(of_steps) // 2] if of_steps else 0.0


def _least(subject: Subject, limits: Limits, side: Side, batch: int) -> tuple[float | None, float | None]:
    """The floors of what the model must do for the prompt, and in a step in the middle of the tokens."""
    if subject.config is None:
        return None, None
    sizes, dtype = subject.sizes, subject.dtype
    prompt = prompt_work(subject.config, sizes.prompt_tokens, dtype, batch=batch)
    middle = sizes.prompt_tokens + sizes.new_tokens // 2
    step = decoding_step_work(subject.config, batch, middle, dtype, cache_dtype=subject.cache_dtype_of(side))
    return limits.floor_s(prompt, dtype), limits.floor_s(step, dtype)


def _disturbed(runs: Sequence[Run]) -> list[str]:
    return [
        f"{run.side}, batch {run.batch}: the machine is too busy. For {run.waited:.0%} of the time other work had the CPU that it "
        "waited for, though rounds were repeated: its latencies are too long, and their parts are not to be believed"
        for run in runs
        if run.is_disturbed
    ]


def _what_is_left(runs: Sequence[Run]) -> list[str]:
    """A sum whose rest is large tells little."""
    return [
        f"{run.side}, batch {run.batch}: the parts of a {name} leave {share:+.0%} of it as rest: other work on this machine?"
        for run in runs
        for name, waterfall in (("first token", run.first_token), ("token", run.token))
        if abs(share := waterfall.parts[-1].seconds / waterfall.measured) > _MOST_REST
    ]


def _command(subject: Subject, model: Any, against: Sequence[str], dtype: Any, device: Any) -> str:
    """What repeats this profile; of an object that was passed from Python, the call."""
    sizes = subject.sizes
    if not (model is None or isinstance(model, str | Path)):
        return (
            f"llama_fast.profile(model, prompt_tokens={sizes.prompt_tokens}, new_tokens={sizes.new_tokens}, "
            f"batch={sizes.batch}, contexts={sizes.contexts}, against={tuple(against)}, rounds={sizes.rounds})"
        )
    words = ["llama-fast", "profile", *([] if model is None else [str(model)])]
    words += ["--prompt-tokens", str(sizes.prompt_tokens), "--new-tokens", str(sizes.new_tokens)]
    words += ["--batch", ",".join(map(str, sizes.batch))]
    words += ["--context", ",".join(map(str, sizes.contexts))] if sizes.contexts else []
    words += ["--against", ",".join(against)] if against else []
    words += ["--rounds", str(sizes.rounds)]
    words += ["--dtype", str(dtype).removeprefix("torch.")] if dtype != "auto" else []
    words += ["--device", str(device)] if device != "auto" else []
    return shlex.join(words)
