"""Generating: time to first token and inter-token latency of our engine ("llama-fast") beside transformers' `generate`: as it is, with a
static cache and its own compiled and graph-captured step, and after `llama_fast.fuse`.

All have the same weights, random or those of a stored model, dtype, prompts and greedy choice, generate the same number of tokens, and take turns. A sample of the first is
a round, a sample of the second a token; of a batch each token counts once, when the last row has it.

Judged are the logits of a text, and what was generated: given a side's own text, float64's logit of each token it chose, as a share of
the best one's. Near-ties cost nothing there, a wrong token does. Of a model too large for a float64 copy, its first layers are judged.
"""

import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast import LLM
from llama_fast.benchmarks.engines.cases import engine_cases
from llama_fast.benchmarks.generation import (
    FIRST_TOKEN,
    INTER_TOKEN,
    JUDGED_NEW,
    JUDGED_PROMPT,
    JUDGED_ROWS,
    MIN_ROUNDS,
    Setting,
    logits_of,
    model_and_prompts,
    shares_of_best,
    work_of,
)
from llama_fast.benchmarks.models import FUSED, StoredModel, in_float64, judged_part
from llama_fast.benchmarks.peers import BASELINE, OURS, Implementations, Unavailable
from llama_fast.benchmarks.shapes import CPU_7M, CPU_125M, LLAMA_3_1_8B, LLAMA_3_2_1B, dtypes
from llama_fast.benchmarks.suite.comparison import (
    CALL_ERRORS,
    FORWARD,
    Case,
    first_line,
    judge,
    release,
    speed_test,
)
from llama_fast.benchmarks.suite.record import Result
from llama_fast.engine.llm import EMBEDDED_MODEL
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.sides import (
    STATIC,
    EngineSide,
    Side,
    fused_side,
    static_side,
    transformers_side,
    without_bars,
)

test_speed = speed_test


def settings(device: torch.device, *, quick: bool) -> list[Setting]:
    """The published models on a GPU, over batch and context; on a CPU one that it can run, in bfloat16 too."""
    if device.type == "cuda":
        few = [(LLAMA_3_2_1B, 1, 512), (LLAMA_3_1_8B, 1, 512)]
        more = [(LLAMA_3_2_1B, 8, 512), (LLAMA_3_2_1B, 1, 8192), (LLAMA_3_2_1B, 1, 32768), (LLAMA_3_1_8B, 1, 8192)]
        sizes = few if quick else few + more
        return [Setting(shape, torch.bfloat16, batch, prompt, 64) for shape, batch, prompt in sizes]
    if quick:
        return [Setting(CPU_7M, dtype, 1, 16, 16) for dtype in dtypes(device, quick=quick)]
    return [
        Setting(CPU_125M, dtype, batch, 64, 64) for dtype in (torch.float32, torch.bfloat16) for batch in (1, 8)
    ]  # fmt: skip


def settings_of(model: StoredModel, device: torch.device, *, quick: bool) -> list[Setting]:
    """A stored model alone: one request and a batch, of as many tokens as it has room for."""
    prompt, new = (16, 16) if quick else (512, 64) if device.type == "cuda" else (64, 64)
    room = model.config.max_positions // 2
    both = (torch.float32, torch.bfloat16)
    return [
        Setting(model, dtype, batch, min(prompt, room), min(new, room))
        for dtype in (dtypes(device, quick=quick) if quick or device.type == "cuda" else both) for batch in ((1,) if quick else (1, 8))
    ]  # fmt: skip


def cases(device: torch.device, *, quick: bool, model: StoredModel | None = None) -> list[Case]:
    """Two for each setting, which are measured as one; on a CPU also those beside other engines."""
    found = settings(device, quick=quick) if model is None else settings_of(model, device, quick=quick)
    sides = [
        GenerateCase(setting, direction, device.type)
        for setting in found for direction in (FIRST_TOKEN, INTER_TOKEN)
    ]  # fmt: skip
    return [*sides, *(engine_cases(quick=quick, model=model) if device.type == "cpu" else [])]


@dataclass(frozen=True)
class GenerateCase:
    """One of the two latencies of a setting."""

    setting: Setting
    direction: str
    device_type: str
    op: str = "generate"

    @property
    def shape(self) -> str:
        return str(self.setting)

    @property
    def dtype(self) -> torch.dtype:
        return self.setting.dtype

    def implementations(self) -> Implementations:
        found: Implementations = {**_MAKERS}
        if self.device_type != "cuda":
            found[STATIC] = Unavailable("transformers compiles the step over a static cache on a GPU alone")
        return found

    def measure(self, device: torch.device, limits: Limits, *, seconds: float) -> list[Result]:
        names = tuple(
            name for name, maker in self.implementations().items() if not isinstance(maker, Unavailable)
        )  # fmt: skip
        rounds = _generated(self.setting, names, device, seconds)
        work = work_of(self.setting, self.direction)
        counted: dict[str, Any] = dict(
            read=work.read, written=work.written, flops=work.flops, floor_s=limits.floor_s(work, self.dtype)
        )
        return [
            replace(
                result, direction=self.direction, samples=list(rounds.samples(self.direction, name)),
                note=rounds.note(name), **counted,
            )
            for name, result in rounds.judged.items()
        ]  # fmt: skip


@dataclass
class _Rounds:
    """What all sides have done in turns: the seconds of each token of each round, and the first round's text."""

    judged: dict[str, Result]
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    texts: dict[str, list[list[int]]] = field(default_factory=dict)

    def samples(self, direction: str, name: str) -> list[float]:
        rounds = self.times.get(name, [])
        if direction == FIRST_TOKEN:
            return [times[0] for times in rounds]
        return [later - earlier for times in rounds for earlier, later in itertools.pairwise(times)]

    def note(self, name: str) -> str | None:
        """How many greedy tokens all rows have in common with transformers; random weights leave many near-ties."""
        if name == BASELINE or not {name, BASELINE} <= self.texts.keys():
            return None
        rows = list(zip(self.texts[name], self.texts[BASELINE], strict=True))
        same = min(next((i for i, (x, y) in enumerate(zip(*row, strict=True)) if x != y), len(row[0])) for row in rows)
        return f"{same} of {len(rows[0][0])} greedy tokens as PyTorch's"


@functools.lru_cache(maxsize=1)  # the two latencies of a setting come one after the other
def _generated(setting: Setting, names: tuple[str, ...], device: torch.device, seconds: float) -> _Rounds:
    release()
    torch.manual_seed(0)
    model, prompts = model_and_prompts(setting, device)
    rounds = _Rounds(_judged(setting, names, model, prompts))
    release()
    sides: dict[str, Side] = {}
    for name in names:
        if rounds.judged[name].failure is None:
            try:
                sides[name] = _warm(name, model, setting, prompts, rounds)
            except CALL_ERRORS as error:
                failure = f"it cannot be timed: {first_line(error)}"
                rounds.judged[name] = replace(rounds.judged[name], failure=failure)
    start, count = time.perf_counter(), 0
    while sides and (count < MIN_ROUNDS or time.perf_counter() - start < seconds * len(sides)):
        shift = count % len(sides)
        order = list(sides)
        for name in order[shift:] + order[:shift]:
            rounds.times.setdefault(name, []).append(sides[name].generate(prompts, setting.new).times)
        count += 1
    return rounds


def _warm(name: str, model: Any, setting: Setting, prompts: Tensor, rounds: _Rounds) -> Side:
    """A side that has generated twice: it has compiled and captured what it does."""
    side = _MAKERS[name](model, setting)
    for _ in range(2):
        rounds.texts[name] = side.generate(prompts, setting.new).token_ids
    return side


def _judged(setting: Setting, names: tuple[str, ...], model: Any, prompts: Tensor) -> dict[str, Result]:
    """Each side's error, of the text of a few rows."""
    part = judged_part(model)
    reference = in_float64(part)
    prompts = prompts[:JUDGED_ROWS, :JUDGED_PROMPT]
    new = min(setting.new, JUDGED_NEW)
    small = replace(setting, batch=len(prompts), prompt=prompts.shape[1], new=new)

    def answer(name: str) -> list[Tensor]:
        side = _MAKERS[name](part, small)
        texts = side.generate(prompts, new).token_ids
        chosen = [shares_of_best(reference, *row) for row in zip(prompts, texts, strict=True)]
        return [side.logits(prompts[0]), torch.cat(chosen)]

    expected = [logits_of(reference, prompts[0]), torch.ones(len(prompts) * new, device=prompts.device)]
    calls = {name: functools.partial(answer, name) for name in names}
    return judge(GenerateCase(setting, FORWARD, prompts.device.type), expected, calls)


def _engine(model: Any, setting: Setting) -> Side:
    from transformers import AutoTokenizer

    longest = setting.prompt + setting.new
    size = sum(x.numel() * x.element_size() for x in model.parameters())
    with tempfile.TemporaryDirectory(dir=_folder_in_memory(size)) as folder:
        with without_bars():
            model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)
        llm = LLM(
            folder, dtype=setting.dtype, device=model.device, max_batch=setting.batch, max_context=longest,
            max_cache_tokens=2 * setting.batch * longest, progress=False,
        )  # fmt: skip
    return EngineSide(llm)


def _folder_in_memory(size: int) -> Path | None:
    """Where a checkpoint of `size` bytes is soonest written and read (an 8B model has 16 GB); None: wherever temporary files go."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 2 * size else None


_MAKERS: Mapping[str, Callable[[Any, Setting], Side]] = {
    OURS: _engine,
    BASELINE: lambda model, _: transformers_side(model),
    STATIC: lambda model, _: static_side(model),
    FUSED: lambda model, _: fused_side(model),
}
