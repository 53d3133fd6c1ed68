"""A comparison: one piece of work, done by several implementations on the same inputs, judged first and then timed in turns.

A benchmark file has `cases(device, quick=...)`, which lists its comparisons without making any tensor, and `test_speed`, which
runs them under pytest-benchmark. `llama-fast bench` runs the same cases with a progress bar.
"""

import functools
import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama_fast.benchmarks.peers import BASELINE, OURS, Implementation, Implementations, Unavailable
from llama_fast.benchmarks.suite.record import Result, Skipped
from llama_fast.environment import default_device
from llama_fast.kernels.parity import GRADIENT_FACTOR, OUTPUT_FACTOR, error_bound, relative_error
from llama_fast.kernels.triton_compat import triton
from llama_fast.profiler.measure.limits import Limits, measure_limits
from llama_fast.profiler.measure.timing import Call, Timing, time_interleaved
from llama_fast.profiler.measure.work import Work

FORWARD = "forward"
TRAINING = "forward + backward"

SECONDS = 0.4
"""That each implementation of a case is timed: some hundred samples on a GPU."""
QUICK_SECONDS = 0.1

CALL_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, NotImplementedError, AssertionError,
    OSError, triton.TritonError,
)  # fmt: skip
"""What implementations raise that cannot do what they are asked for."""


class Case(Hashable, Protocol):
    """One piece of work, not begun yet."""

    @property
    def op(self) -> str: ...

    @property
    def shape(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def direction(self) -> str: ...

    def implementations(self) -> Implementations:
        """Who does it, by name."""

    def measure(self, device: torch.device, limits: Limits, *, seconds: float) -> list[Result]:
        """Judges and times all of them, `seconds` each."""


@dataclass(frozen=True)
class Problem:
    """The tensors of an op's case.

    Attributes:
        inputs: what each implementation is called with. Tensors must be dense: a copy has their strides.
        reference: the same function in float64, called with the inputs in float64.
        work: what one call must do (forward, or forward and backward).
        differentiable: the inputs that get gradients where a case trains; all floating-point tensors by default.
        judged: for an op that writes into its inputs: what is compared, given the inputs after the call and the outputs.
    """

    inputs: tuple[Any, ...]
    reference: Implementation
    work: Work
    differentiable: tuple[int, ...] | None = None
    judged: Callable[[tuple[Any, ...], list[Tensor]], list[Tensor]] | None = None

    def call(self, implementation: Implementation, inputs: tuple[Any, ...], direction: str) -> Call:
        """One call of `implementation`; a training one returns the outputs and the gradients."""
        if direction == FORWARD:
            return _forward(implementation, inputs)
        wanted = self.differentiable
        if wanted is None:
            wanted = tuple(i for i, x in enumerate(inputs) if _is_floating(x))
        return _training(implementation, inputs, wanted)

    def results(self, implementation: Implementation, inputs: tuple[Any, ...], direction: str) -> list[Tensor]:
        """What is compared of one call."""
        outputs = tensors(self.call(implementation, inputs, direction)())
        return outputs if self.judged is None else self.judged(inputs, outputs)


@dataclass(frozen=True)
class OpCase:
    """An op at one size. `build` makes the tensors on a device, `peers` the implementations."""

    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    peers: Callable[[], Implementations]
    build: Callable[[torch.device], Problem]

    def implementations(self) -> Implementations:
        return self.peers()

    def measure(self, device: torch.device, limits: Limits, *, seconds: float) -> list[Result]:
        release()
        torch.manual_seed(0)
        problem = self.build(device)
        there = {name: peer for name, peer in self.peers().items() if not isinstance(peer, Unavailable)}
        notes: dict[str, list[str]] = {name: [] for name in there}
        expected = problem.results(problem.reference, tuple(map(_double, problem.inputs)), self.direction)
        once = {name: self._once(problem, peer, notes[name]) for name, peer in there.items()}
        results = judge(self, expected, once)
        del expected
        calls = {
            name: problem.call(peer, _copies(problem.inputs) if _OVERWRITES in notes[name] else problem.inputs, self.direction)
            for name, peer in there.items() if results[name].failure is None
        }  # fmt: skip
        results = {name: replace(result, note=_joined(*notes[name])) for name, result in results.items()}
        return timed(self, results, calls, device, seconds, limits, problem.work)

    def _once(self, problem: Problem, peer: Implementation, notes: list[str]) -> Call:
        """A call on a copy of the inputs, so that no peer can spoil them for the next; `notes` gets what is seen on the way."""

        def call() -> list[Tensor]:
            inputs = _copies(problem.inputs)
            outputs = problem.results(peer, inputs, self.direction)
            pairs = zip(inputs, problem.inputs, strict=True)
            if problem.judged is None and not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
                notes.append(_OVERWRITES)
            if outputs[0].is_cuda:
                peak = _peak_bytes(problem.call(peer, inputs, self.direction), outputs[0].device)
                notes.append(f"takes {peak / 2**30:.3g} GiB beside its inputs")
            return outputs

        return call


_OVERWRITES = "overwrites its inputs: timed on a copy of its own, again and again"


def _peak_bytes(call: Call, device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def judge(case: Case, expected: Sequence[Tensor], calls: Mapping[str, Call]) -> dict[str, Result]:
    """The error of what each call returns against `expected`, in float64; who exceeds the bound, or raises, has a failure."""
    factor = OUTPUT_FACTOR if case.direction == FORWARD else GRADIENT_FACTOR
    named: dict[str, Any] = dict(
        op=case.op, shape=case.shape, dtype=str(case.dtype).removeprefix("torch."), direction=case.direction
    )
    results: dict[str, Result] = {}
    peer_errors: list[float] = []
    # the baseline first, which the others are judged beside; where it cannot run, the next peer. Never ours beside ours
    for name in sorted(calls, key=lambda name: (name != BASELINE, name.startswith(OURS))):
        result = Result(**named, implementation=name)
        try:
            errors = [relative_error(a, e) for a, e in zip(tensors(calls[name]()), expected, strict=True)]
        except CALL_ERRORS as error:
            results[name] = replace(result, failure=f"it raised {type(error).__name__}: {first_line(error)}")
            continue
        if not peer_errors:
            peer_errors = [0.0] * len(errors) if name.startswith(OURS) else errors
        bounds = [
            error_bound(_typical(peer, e), case.dtype, factor=factor)
            for peer, e in zip(peer_errors, expected, strict=True)
        ]
        worst = max(range(len(errors)), key=lambda i: errors[i] / bounds[i])
        result = replace(result, error=errors[worst], bound=bounds[worst], peer_error=peer_errors[worst])
        if errors[worst] > bounds[worst]:
            which = f" of output {worst}" if len(errors) > 1 else ""
            result = replace(result, failure=f"FAIL: error {errors[worst]:.1e}{which} exceeds {bounds[worst]:.1e}")
        results[name] = result
    return {name: results[name] for name in calls}


def _typical(peer_error: float, expected: Tensor) -> float:
    """A single number, such as a loss, has one error and no mean of them: the peer's may be lucky, down to nothing.

    What all sum in is float32, so its eps is an error that nobody is without.
    """
    return max(peer_error, torch.finfo(torch.float32).eps) if expected.numel() == 1 else peer_error


def timed(
    case: Case, results: Mapping[str, Result], calls: Mapping[str, Call], device: torch.device, seconds: float,
    limits: Limits, work: Work, *, graphs: bool = True,
) -> list[Result]:  # fmt: skip
    """`results` with the samples of those calls that have not failed, taken in turns, and with what they have to do."""
    passed = {name: calls[name] for name, result in results.items() if result.failure is None}
    timings, failures = _time(passed, device, seconds, graphs)
    counted: dict[str, Any] = dict(
        read=work.read, written=work.written, flops=work.flops, floor_s=limits.floor_s(work, case.dtype)
    )
    return [
        replace(
            result, samples=list(timings[name].samples) if name in timings else [],
            failure=result.failure or failures.get(name), **counted,
            note=_joined(result.note, _WAITS if name in timings and timings[name].waits else None),
        )
        for name, result in results.items()
    ]  # fmt: skip


_WAITS = "waits for the GPU, so no CUDA graph can hold it: timed as the host launches it"


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _time(
    calls: dict[str, Call], device: torch.device, seconds: float, graphs: bool
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings, and why there is none: a peer that cannot be captured in a graph must not stop the others."""
    failures: dict[str, str] = {}
    while calls:
        current = [""]

        def named(name: str, call: Call, current: list[str] = current) -> Call:
            def run() -> object:
                current[0] = name
                return call()

            return run

        try:
            return time_interleaved(
                {name: named(name, call) for name, call in calls.items()}, device, seconds=seconds, graphs=graphs
            ), failures
        except CALL_ERRORS as error:
            failed = [current[0]] if current[0] else list(calls)  # before the first is called, nobody is to blame
            failures |= dict.fromkeys(failed, f"it cannot be timed: {first_line(error)}")
            calls = {name: call for name, call in calls.items() if name not in failed}
    return {}, failures


def first_line(error: Exception) -> str:
    """What an error says, without what follows it."""
    return next(iter(str(error).splitlines()), "")


def _forward(implementation: Implementation, inputs: tuple[Any, ...]) -> Call:
    def call() -> object:
        with torch.no_grad():
            return implementation(*inputs)

    return call


def _training(implementation: Implementation, inputs: tuple[Any, ...], wanted: tuple[int, ...]) -> Call:
    """A call that returns the outputs and the gradients of the `wanted` inputs, for the same random gradients of the outputs."""
    leaves = tuple(x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(inputs))
    given: list[Tensor] = []

    def call() -> object:
        outputs = tensors(implementation(*leaves))
        if not given:
            given.extend(_upstream_gradients(outputs))
        return [*outputs, *torch.autograd.grad(outputs, [leaves[i] for i in wanted], given)]

    return call


def _upstream_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random, and the same numbers for every dtype, as they are drawn as bfloat16; 1 for a loss, as in training."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator, device=y.device).bfloat16())
        if y.ndim else torch.ones_like(y)
        for y in outputs
    ]  # fmt: skip


def recomputed(function: Implementation) -> Implementation:
    """`function`, which in training keeps its inputs alone: for references whose float64 would not fit into memory."""

    def run(*inputs: Any) -> Any:
        return checkpoint(function, *inputs, use_reentrant=False)

    return run


def tensors(outputs: Any) -> list[Tensor]:
    """What an implementation returns, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _double(x: Any) -> Any:
    return x.double() if _is_floating(x) else x


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def unavailable(cases: Sequence[Case]) -> list[Skipped]:
    """Who cannot run, each once."""
    found = {
        (case.op, name): peer.reason
        for case in cases for name, peer in case.implementations().items() if isinstance(peer, Unavailable)
    }  # fmt: skip
    return [Skipped(op, name, reason) for (op, name), reason in found.items()]


def release() -> None:
    """Gives back what a case has taken: its tensors, and what torch.compile has made of its shapes, which costs each call a look."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Player:
    """A clock for pytest-benchmark that plays back what was measured: its rounds are our samples."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def play(self, benchmark: Any, samples: Sequence[float]) -> None:
        left = iter(samples)

        def to_zero() -> None:
            self._now = 0.0

        def to_end_of_call() -> None:
            self._now = next(left)

        benchmark.pedantic(to_end_of_call, setup=to_zero, rounds=len(samples))


_PLAYER = _Player()


@functools.cache
def _limits(device: torch.device, quick: bool) -> Limits:
    return measure_limits(device, quick=quick)


@functools.lru_cache(maxsize=1)  # pytest runs the implementations of a case one after the other
def _measured(case: Case, device: torch.device, quick: bool) -> dict[str, Result]:
    seconds = QUICK_SECONDS if quick else SECONDS
    return {result.implementation: result for result in case.measure(device, _limits(device, quick), seconds=seconds)}


@pytest.mark.benchmark(timer=_PLAYER, disable_gc=False)
def speed_test(benchmark: Any, case: Case, implementation: str, quick: bool) -> None:
    """One implementation of one case. All of a case are judged and timed together; this hands its samples to pytest-benchmark."""
    peer = case.implementations()[implementation]
    if isinstance(peer, Unavailable):
        pytest.skip(peer.reason)
    result = _measured(case, default_device(), quick)[implementation]
    if result.failure is not None:
        pytest.fail(result.failure, pytrace=False)
    benchmark.group = ", ".join(result.work_key)
    _PLAYER.play(benchmark, result.samples)
    benchmark.extra_info.update(
        relative_error=result.error, error_bound=result.bound, gigabytes_per_s=result.gigabytes_per_s,
        teraflops=result.teraflops, share_of_limit=result.share_of_limit, note=result.note,
    )  # fmt: skip
