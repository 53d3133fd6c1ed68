"""What a profile holds; `jsonfile` writes and reads it. All times are seconds, all sizes bytes."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from .measure.limits import Limits
from .measure.quiet import is_busy
from .measure.timing import quantile


@dataclass(frozen=True)
class Distribution:
    """Samples in seconds, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        return quantile(self.samples, q)

    @property
    def spread(self) -> float:
        """From p20 to p80, as a share of the median."""
        return (self.quantile(0.8) - self.quantile(0.2)) / self.median


@dataclass(frozen=True)
class Latency:
    """Of requests that arrive together, named as vLLM's benchmarks name them; a token counts when the slowest request has it.

    Warm; `cold_ttft` is the first request of the process.

    Attributes:
        ttft: time to first token, a sample a round.
        itl: inter-token latency: from each token to the next, all rounds one after the other.
        tpot: time per output token after the first: a sample a round.
        e2el: end-to-end latency: a sample a round.
        batch: requests at once; each gets `1 / itl` tokens a second, all together `batch / itl`.
    """

    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2el: Distribution
    cold_ttft: float
    batch: int

    @property
    def tokens_per_s(self) -> float:
        """Of one request, by the median of ITL."""
        return 1 / self.itl.median

    @property
    def total_tokens_per_s(self) -> float:
        return self.batch / self.itl.median


@dataclass(frozen=True)
class Part:
    """A share of a latency. `kind` is one of KINDS; a part measured apart from the latency may be negative only if it is "rest"."""

    name: str
    seconds: float
    kind: str
    note: str = ""


KINDS = ("floor", "inefficiency", "gap", "host", "sampling", "read-back", "text", "compile", "rest")


@dataclass(frozen=True)
class Waterfall:
    """A latency and the parts that add up to it: "rest" holds what could not be attributed, so that the sum is exact."""

    measured: float
    parts: list[Part]
    hidden: list[Part] = field(
        default_factory=list
    )  # host work done while the GPU is busy: it costs no latency, and is in no sum


@dataclass(frozen=True)
class Kernel:
    """A kernel on a GPU, an operator on a CPU: all its calls in one step.

    Attributes:
        name: the kernel's, or the operator's.
        where: what part of the model it is ("attention.qkv", "mlp.down", "head", "sampling", "not attributed").
        calls: in one step.
        seconds: of all calls.
        read, written, flops: what must be done; zero where it is not known.
        floor: the least time for that by the measured limits.
        samples: seconds of all calls in each step that was traced, so that two profiles can be compared; `seconds` is their median.
    """

    name: str
    where: str
    calls: int
    seconds: float
    read: int
    written: int
    flops: int
    floor: float
    samples: tuple[float, ...] = ()

    @property
    def winnable(self) -> float:
        """Seconds that could still be won."""
        return max(0.0, self.seconds - self.floor)

    @property
    def share_of_limit(self) -> float:
        return self.floor / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Run:
    """One side at one setting.

    Attributes:
        side: "llama-fast", "transformers", "transformers, fused", "transformers, static cache + compile".
        first_token, token: where TTFT and ITL (their medians) go.
        kernels: of one decoding step; `prompt_kernels`: of the prompt's computation.
        waited: the share of the measured time in which threads were ready and other work had the CPUs, all threads together and 1
            at most; of the rounds, or of what timed the operators if that was disturbed more. None: not known.
    """

    side: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    latency: Latency
    first_token: Waterfall
    token: Waterfall
    kernels: list[Kernel]
    prompt_kernels: list[Kernel]
    waited: float | None = None

    @property
    def is_disturbed(self) -> bool:
        """Whether other work took so much that the parts of its latency are not to be believed."""
        return is_busy(self.waited)


@dataclass(frozen=True)
class ContextPoint:
    """A decoding step at a context length: what it must read, its floor, and what it took (None where it was only computed)."""

    side: str
    context: int
    batch: int
    weight_bytes: int
    kv_bytes: int
    floor: float
    measured: Distribution | None


@dataclass(frozen=True)
class Ablation:
    """A decoding step with one fusion switched off, in turns with all on."""

    fusion: str
    on: Distribution
    off: Distribution

    @property
    def gain(self) -> float:
        """Seconds a token that the fusion saves; negative where it loses."""
        return self.off.median - self.on.median


@dataclass(frozen=True)
class Trust:
    """Why the figures may be believed.

    Attributes:
        logit_errors: each side's relative RMS error of the logits against float64; `largest_logit_errors` the largest absolute one.
        logits_pass: whether ours is within the bound beside transformers' own; None without transformers.
        common_tokens, tokens: greedy tokens in common with transformers, of how many.
        same_bits: whether two runs gave the same logits, bit for bit.
        warm: whether the first and the last quarter of the timed tokens agree (medians within 5 %).
        before, after: the GPU's clocks, power and throttling around the timed rounds; empty on a CPU.
        memory: the engine's ledger.
        command: what repeats this.
        warnings: what a reader must know.
    """

    logit_errors: dict[str, float]
    largest_logit_errors: dict[str, float]
    logits_pass: bool | None
    common_tokens: int | None
    tokens: int
    same_bits: bool
    warm: bool
    before: dict[str, str]
    after: dict[str, str]
    memory: dict[str, int]
    command: str
    warnings: list[str]


@dataclass(frozen=True)
class Profile:
    """A whole profile: the first run is the subject's, others at the same setting are what it is set against."""

    model: str
    dtype: str
    device: str
    machine: dict[str, Any]
    limits: Limits
    runs: list[Run]
    contexts: list[ContextPoint]
    ablations: list[Ablation]
    trust: Trust
