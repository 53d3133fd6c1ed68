"""The demo: generate with plain transformers, fuse, generate again, and set the numbers side by side, from one run."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decoder.checkpoint import find
from ..engine.llm import EMBEDDED_MODEL, LLM
from ..engine.sampling_params import SamplingParams
from ..environment import implementation_on
from ..fusion import FuseReport, fuse, unfuse
from ..fusion.verify import InFloat64
from ..kernels.parity import error_bound, relative_error
from ..profiler.measure.sides import load_transformers

PROMPT = "Once upon a time, there was a brave owl named Mia."
QUESTION = "What causes the tides? Answer in one sentence."


@dataclass(frozen=True)
class Opening:
    """What the text goes on from, or the question that it answers: `is_chat`."""

    text: str
    is_chat: bool = False

    def encoded(self, tokenizer: Any) -> Any:
        """The model's inputs. Raises ValueError if there is no token, or no chat template for a question."""
        if not self.is_chat:
            inputs = tokenizer(self.text, return_tensors="pt")
        elif tokenizer.chat_template:
            messages = [{"role": "user", "content": self.text}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            raise ValueError("the model has no chat template: it is not a chat model; give it a prompt to go on from")
        if not inputs.input_ids.numel():
            raise ValueError("the prompt is empty: give at least one token")
        return inputs


@dataclass(frozen=True)
class Side:
    """Who wrote: the plain model, the fused one, or the engine. What it wrote, how wrong its logits are, how fast it was (medians
    over the rounds)."""

    text: str
    token_ids: list[int]
    largest_logit_error: float
    relative_logit_error: float
    tokens_per_second: float
    first_token_ms: float
    token_ms: float
    peak_memory_mib: float | None


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows. `engine` is `llama_fast.LLM` on the same weights, or why it is not there."""

    model: str
    implementation: str
    dtype: str
    opening: Opening
    report: FuseReport
    plain: Side
    fused: Side
    engine: Side | str
    rounds: int

    def logits_pass(self, side: Side) -> bool:
        """Whether a side's logits keep to the error rule beside the plain model's."""
        return side.relative_logit_error <= error_bound(self.plain.relative_logit_error, getattr(torch, self.dtype))

    def identical_tokens(self, side: Side) -> int:
        """The greedy tokens before the first that is not the plain model's."""
        pairs = zip(self.plain.token_ids, side.token_ids, strict=False)
        shorter = min(len(self.plain.token_ids), len(side.token_ids))
        return next((i for i, (x, y) in enumerate(pairs) if x != y), shorter)


@dataclass
class _Clock:
    """A streamer for `generate` that notes when each token reached the host."""

    times: list[float] = field(default_factory=list)

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class _Round:
    """One timed generation, in seconds."""

    first_token: float
    tokens: list[float]  # from each token to the next
    peak_memory_mib: float | None


def run_demo(
    model_path: str | Path = EMBEDDED_MODEL, *, opening: Opening | None = None, new_tokens: int = 64, rounds: int = 5,
    device: torch.device, dtype: torch.dtype, progress: Callable[[str], None] = lambda _: None,
) -> DemoResult:  # fmt: skip
    """Loads a causal language model, generates greedily with and without fused layers, and measures both.

    Without an `opening` a model with a chat template is asked `QUESTION`; others go on from `PROMPT`, and so does the embedded one, which
    knows stories.

    The rounds alternate between the two, after one round of each that is not counted; those of the engine, which has the weights a second
    time, follow.

    Raises:
        ValueError: `opening` is empty, or a question to a model without a chat template; or `new_tokens` or `rounds` is less than
            2 or 1.
        OSError: no model is at `model_path`, or it cannot be loaded.
    """
    if new_tokens < 2 or rounds < 1:
        raise ValueError(f"new_tokens must be at least 2 and rounds at least 1, got {new_tokens} and {rounds}")
    progress(f"loading {model_path}")
    model: Any
    # found first: transformers would ask an absent hub for each file, six times
    model, tokenizer = load_transformers(str(find(model_path)), dtype=dtype, device=device)
    if opening is None:
        asks = tokenizer.chat_template and Path(model_path) != EMBEDDED_MODEL
        opening = Opening(QUESTION, is_chat=True) if asks else Opening(PROMPT)
    inputs = opening.encoded(tokenizer).to(device)

    progress("generating with plain transformers")
    plain_ids = _generate(model, tokenizer, inputs, new_tokens)
    progress("logits in float64, the reference")
    reference = copy.deepcopy(model).to("cpu", torch.float64)
    with InFloat64():
        expected = _logits(reference, plain_ids)
    del reference
    plain_logits = _logits(model, plain_ids)
    progress("fusing, and checking every swapped layer")
    report = fuse(model)
    fused_ids, fused_logits = _generate(model, tokenizer, inputs, new_tokens), _logits(model, plain_ids)
    unfuse(model)

    timed: dict[bool, list[_Round]] = {False: [], True: []}
    for i in range(-1, rounds):
        for fused in (False, True):
            progress(f"round {max(i, 0) + 1} of {rounds}, {'fused' if fused else 'transformers'}")
            if fused:
                _fuse_the_same(model, report)
            sample = _timed_generation(model, tokenizer, inputs, new_tokens)
            if fused:
                unfuse(model)
            if i >= 0:
                timed[fused].append(sample)

    prompt_length = inputs.input_ids.shape[1]
    plain = _side(tokenizer, plain_ids, prompt_length, plain_logits, expected, timed[False])
    fused_side = _side(tokenizer, fused_ids, prompt_length, fused_logits, expected, timed[True])
    progress("the engine")
    engine = _engine(model_path, tokenizer, inputs.input_ids, plain_ids, expected, new_tokens, rounds, dtype=dtype)
    return DemoResult(
        model=str(model_path),
        implementation=implementation_on(device).name,
        dtype=str(dtype).removeprefix("torch."),
        opening=opening,
        report=report,
        plain=plain,
        fused=fused_side,
        engine=engine,
        rounds=rounds,
    )


def _fuse_the_same(model: Any, report: FuseReport) -> None:
    """Swaps the layers of `report`: without the checks, which take longer than a round, if structure alone finds the same."""
    found = fuse(model, verify=False).swapped
    if {(layer.name, layer.kind) for layer in found} != {(layer.name, layer.kind) for layer in report.swapped}:
        unfuse(model)
        fuse(model)


def _generate(model: Any, tokenizer: Any, inputs: Any, new_tokens: int, streamer: Any = None) -> Tensor:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # of a single token there is no time from one to the next
    lengths = dict(min_new_tokens=2, max_new_tokens=new_tokens)
    ids: Tensor = model.generate(**inputs, **lengths, do_sample=False, num_beams=1, pad_token_id=pad, streamer=streamer)
    return ids


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids.to(model.device), use_cache=False).logits
    return logits.cpu()


def _timed_generation(model: Any, tokenizer: Any, inputs: Any, new_tokens: int) -> _Round:
    device = inputs.input_ids.device
    _reset_peak_memory(device)
    clock = _Clock()
    start = time.perf_counter()
    _generate(model, tokenizer, inputs, new_tokens, clock)
    # the streamer is given the prompt before the first token
    _, first, *rest = clock.times
    gaps = [later - earlier for earlier, later in zip([first, *rest], rest, strict=False)]
    return _Round(first - start, gaps, _peak_memory_mib(device))


def _engine(
    model_path: str | Path, tokenizer: Any, prompt_ids: Tensor, plain_ids: Tensor, expected: Tensor, new_tokens: int,
    rounds: int, *, dtype: torch.dtype,
) -> Side | str:  # fmt: skip
    """`llama_fast.LLM` with the same prompt, without the prefix that it remembers; where it does not take the model, what it says."""
    device, prompt = plain_ids.device, prompt_ids[0].tolist()
    try:
        llm = LLM(model_path, dtype=dtype, device=device, max_batch=1, progress=False)
    except ValueError as error:
        return str(error)
    samples = []
    for _ in range(rounds + 1):
        llm.forget_prefixes()
        times: list[float] = []
        start = time.perf_counter()
        request = llm.submit(prompt, SamplingParams(temperature=0.0, min_tokens=2, max_tokens=new_tokens))
        while not request.done:
            llm.step()
            times += [time.perf_counter()] * (len(request.completion.token_ids) - len(times))
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        samples.append(_Round(times[0] - start, gaps, None))
    ids = torch.tensor([prompt + request.completion.token_ids])
    logits = llm.logits(plain_ids[0]).cpu()[None]
    return _side(tokenizer, ids, len(prompt), logits, expected, samples[1:])


def _side(
    tokenizer: Any, ids: Tensor, prompt_length: int, logits: Tensor, expected: Tensor, rounds: list[_Round]
) -> Side:
    peaks = [sample.peak_memory_mib for sample in rounds if sample.peak_memory_mib is not None]
    new_ids = ids[0, prompt_length:]
    return Side(
        text=tokenizer.decode(new_ids, skip_special_tokens=True),
        token_ids=new_ids.tolist(),
        largest_logit_error=(logits.double() - expected).abs().max().item(),
        relative_logit_error=relative_error(logits, expected),
        tokens_per_second=statistics.median(
            (1 + len(sample.tokens)) / (sample.first_token + sum(sample.tokens)) for sample in rounds
        ),
        first_token_ms=1e3 * statistics.median(sample.first_token for sample in rounds),
        token_ms=1e3 * statistics.median(gap for sample in rounds for gap in sample.tokens),
        peak_memory_mib=max(peaks) if peaks else None,
    )


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the process's peak resident size


def _peak_memory_mib(device: torch.device) -> float | None:
    """On a GPU what PyTorch allocated, on Linux the process's resident size; None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
