"""llama-fast beside engines of other projects on the CPU, each in a process of its own with its own environment.

All compute with the same weights, in the same precision (of weights, products and cache), on as many threads, and generate as many tokens after
the same prompts. They take turns, and idle while another is measured; a turn that other work disturbed is repeated. Judged are the
logits and the text of each, beside transformers' own error, as in `bench_generate`; notes say memory, and how many greedy tokens are llama-fast's.
The limit of a token is what reading as many bytes takes in the same rounds: they may fit into caches that the machine's limit does not know.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast.benchmarks.engines.peers import Peer, engines, folder_of, load_saved
from llama_fast.benchmarks.engines.process import Worker
from llama_fast.benchmarks.generation import (
    FIRST_TOKEN,
    INTER_TOKEN,
    JUDGED_NEW,
    JUDGED_ROWS,
    MIN_ROUNDS,
    Setting,
    chat_ids,
    logits_of,
    prompts_of,
    shares_of_best,
    work_of,
)
from llama_fast.benchmarks.models import JUDGED_ELEMENTS, StoredModel, in_float64
from llama_fast.benchmarks.peers import BASELINE, OURS, Implementations, Unavailable
from llama_fast.benchmarks.shapes import CPU_7M, CPU_125M, ModelShape
from llama_fast.benchmarks.suite.comparison import CALL_ERRORS, FORWARD, first_line, judge, release
from llama_fast.benchmarks.suite.record import Result
from llama_fast.decoder import smollm2
from llama_fast.decoder.checkpoint_layout import weight_bytes
from llama_fast.engine.llm import EMBEDDED_MODEL
from llama_fast.kernels.huge_pages import prefer_huge_pages
from llama_fast.profiler.measure.limits import Limits, readers
from llama_fast.profiler.measure.quiet import Patience, is_busy, mean_share
from llama_fast.profiler.measure.sides import transformers_side
from llama_fast.profiler.measure.timing import Call

THREADS = (1, 2)

_NEW = 32  # tokens of a generation: five rounds of these settings take three engines a minute or two
_ROUNDS = 10  # times as long as calls of a kernel: of a small model's round most is pauses
_PAUSE = 0.05  # seconds until the threads of who was measured last have gone to sleep
_READS = 10  # of a round: as a token's, the first may find in no cache what the others do


@dataclass(frozen=True)
class EngineCase:
    """One of the latencies of a session."""

    session: "Session"
    setting: Setting
    direction: str
    op: str = "engines"

    @property
    def shape(self) -> str:
        threads = self.session.threads
        return f"{self.setting}, {threads} thread{'s' if threads > 1 else ''}"

    @property
    def dtype(self) -> torch.dtype:
        return self.setting.dtype

    def implementations(self) -> Implementations:
        """Nobody, and why, where no other engine is there: ours alone is no comparison."""
        found: Implementations = {}
        config = self.setting.config
        for name, engine in engines().items():
            reason = engine.why_not(config)
            if not engine.program.is_installed:
                reason = "not installed; make peers"
            elif weight_bytes(config, torch.float64) > 8 * JUDGED_ELEMENTS:
                reason = "the model is too large for the float64 copy that all are judged by"
            found[name] = engine.model if reason is None else Unavailable(reason)
        there = [name for name, engine in found.items() if not isinstance(engine, Unavailable)]
        return found if there != [OURS] else {name: found[name] for name in found if name != OURS}

    def measure(self, device: torch.device, limits: Limits, *, seconds: float) -> list[Result]:
        names = [name for name, engine in self.implementations().items() if not isinstance(engine, Unavailable)]
        if not names:
            return []
        turns = _turns(self.session, tuple(names), seconds)
        work = work_of(self.setting, self.direction)
        if self.direction == INTER_TOKEN and turns.reads:
            limits = replace(limits, read_bytes_per_s=self.session.read_bytes / min(turns.reads))
        counted: dict[str, Any] = dict(
            read=work.read, written=work.written, flops=work.flops, floor_s=limits.floor_s(work, self.dtype)
        )
        return [
            replace(
                turns.judged[name], op=self.op, shape=self.shape, direction=self.direction,
                samples=turns.samples(self.setting, self.direction, name),
                note=turns.note(self.setting, self.direction, name), **counted,
            )
            for name in names
        ]  # fmt: skip


@dataclass(frozen=True)
class Session:
    """What is measured with the same processes: a model in a dtype on so many threads, with plain texts or in a `chat`."""

    model: ModelShape | StoredModel
    dtype: torch.dtype
    threads: int
    quick: bool = False
    chat: bool = False

    @property
    def read_bytes(self) -> int:
        """Of a token of one text: its weights, and some of the cache."""
        return work_of(next(iter(self.settings())), INTER_TOKEN).read

    def settings(self) -> dict[Setting, str]:
        """What is generated, and which latency is taken of it: a token of one text and of eight, and a prompt; or a token of a chat."""
        if self.chat:
            assert isinstance(self.model, StoredModel)
            prompt = len(chat_ids(self.model))
            return {Setting(self.model, self.dtype, 1, prompt, _NEW, chat=True): INTER_TOKEN}
        room = Setting(self.model, self.dtype, 1, 0, 0).config.max_positions
        if self.quick:
            return {Setting(self.model, self.dtype, 1, min(16, room // 2), min(16, room // 2)): INTER_TOKEN}
        prompt, new = min(64, room // 2), min(_NEW, room // 2)
        decoding = {Setting(self.model, self.dtype, batch, prompt, new): INTER_TOKEN for batch in (1, 8)}
        return decoding | {Setting(self.model, self.dtype, 1, min(512, room - 1), 1): FIRST_TOKEN}


def engine_cases(*, quick: bool, model: StoredModel | None = None) -> list[EngineCase]:
    """Of a stored model, or of one with random weights and of two real ones as they are used; those of a session come one after the other."""
    if quick:
        sessions = [Session(model or CPU_7M, torch.float32, THREADS[-1], quick=True)]
    else:
        sessions = [
            Session(model or CPU_125M, dtype, threads)
            for dtype in (torch.float32, torch.bfloat16) for threads in THREADS
        ]  # fmt: skip
        if model is None:
            sessions += _real_sessions()
    return [
        EngineCase(session, setting, direction)
        for session in sessions for setting, direction in session.settings().items()
    ]  # fmt: skip


def _real_sessions() -> list[Session]:
    """The embedded model, which one thread is enough for, and a chat with SmolLM2 where it is installed."""
    found = [Session(StoredModel("embedded", EMBEDDED_MODEL), torch.float32, 1)]
    if (file := smollm2.installed()) is not None:
        model = StoredModel(smollm2.NAME, file)
        found += [Session(model, torch.bfloat16, threads, chat=True) for threads in THREADS]
    return found


@dataclass
class _Side:
    """An engine that has its model, and what it did: of each setting the seconds of each token of each round, and the text."""

    worker: Worker
    patience: Patience
    times: dict[Setting, list[list[float]]] = field(default_factory=dict)
    texts: dict[Setting, list[list[int]]] = field(default_factory=dict)
    waited: list[float | None] = field(default_factory=list)
    peak: int = 0
    memory: str = ""

    def logits(self, ids: list[int]) -> Tensor:
        """Without what they take counted as memory: OpenVINO's are of a second copy of its model, which nobody generates with."""
        self.peak = max(self.peak, self.worker.peak or 0)
        logits = self.worker.logits(ids)
        self.worker.forget_peak()
        return logits

    def turn(self, setting: Setting, prompts: list[list[int]]) -> None:
        """A timed one."""
        time.sleep(_PAUSE)
        once = functools.partial(self.worker.generate, prompts, setting.new)
        (times, texts), waited = self.patience.undisturbed(once)
        self.times.setdefault(setting, []).append(times)
        self.texts[setting] = texts
        self.waited.append(waited)

    def close(self) -> None:
        peak, imported = max(self.peak, self.worker.peak or 0), self.worker.imported
        if peak and imported is not None:
            self.memory = (
                f"peak memory {peak / 2**20:,.0f} MiB, {(peak - imported) / 2**20:,.0f} more than after imports"
            )
        self.worker.close()


@dataclass
class _Turns:
    """What all engines of a session did."""

    judged: dict[str, Result]
    sides: dict[str, _Side] = field(default_factory=dict)
    reads: list[float] = field(default_factory=list)

    def samples(self, setting: Setting, direction: str, name: str) -> list[float]:
        rounds = self.sides[name].times[setting] if name in self.sides else []
        if direction == FIRST_TOKEN:
            return [times[0] for times in rounds]
        return [later - earlier for times in rounds for earlier, later in itertools.pairwise(times)]

    def note(self, setting: Setting, direction: str, name: str) -> str | None:
        if name not in self.sides:
            return None
        side = self.sides[name]
        found = [side.worker.version, side.memory]
        if direction == INTER_TOKEN:
            median = replace(self.judged[name], samples=self.samples(setting, direction, name)).timing.median
            found.append(f"{setting.batch / median:,.0f} tokens/s")
            if name == OURS and self.reads:
                found.append(
                    f"to read what a token of one text does takes {1e3 * statistics.median(self.reads):.3g} ms"
                )
        if name != OURS and OURS in self.sides:
            found.append(agreement(side.texts[setting], self.sides[OURS].texts[setting]))
        if is_busy(waited := mean_share(side.waited)):
            found.append(f"other work had the CPUs for {waited:.0%} of its time")
        return "; ".join(part for part in found if part)


def agreement(texts: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> str:
    """How many tokens of all rows are the same, and where the first other one is."""
    same = [[x == y for x, y in zip(*rows, strict=True)] for rows in zip(texts, ours, strict=True)]
    count, equal = sum(map(len, same)), sum(map(sum, same))
    said = f"{equal} of {count} greedy tokens as {OURS}'s"
    return (
        said
        if equal == count
        else f"{said}, the first other one is token {min(row.index(False) for row in same if not all(row))}"
    )


@functools.lru_cache(maxsize=1)  # the cases of a session come one after the other
def _turns(session: Session, names: tuple[str, ...], seconds: float) -> _Turns:
    release()
    torch.manual_seed(0)
    prompts = _prompts(session)
    folder = folder_of(session.model, session.dtype)
    model = load_saved(session.model, session.dtype, folder)
    with ExitStack() as stack:
        sides: dict[str, _Side] = {}
        failures: dict[str, str] = {}
        for name in names:
            try:
                sides[name] = _loaded(engines()[name], folder, session, stack)
            except CALL_ERRORS as error:
                failures[name] = f"it cannot be started: {first_line(error)}"
        turns = _Turns(_judged(session, model, prompts, sides, failures))
        del model
        release()
        for name, side in sides.items():
            if turns.judged[name].failure is None:
                turns.sides[name] = side
        _take_turns(turns, session, prompts, seconds)
    return turns


def _loaded(engine: Peer, folder: Path, session: Session, stack: ExitStack) -> _Side:
    """An engine with its model, which ends with `stack`."""
    settings = session.settings()
    model = engine.model(folder, session.dtype)
    worker = Worker(engine.program, threads=session.threads)
    side = _Side(worker, Patience(MIN_ROUNDS * len(settings), worker.pid))
    stack.callback(side.close)
    worker.load(
        model, session.dtype, threads=session.threads, batch=max(each.batch for each in settings),
        context=max(each.prompt + each.new for each in settings),
        tokens=max(each.batch * (each.prompt + each.new) for each in settings),
    )  # fmt: skip
    return side


def _prompts(session: Session) -> dict[Setting, Tensor]:
    """Of each setting the first rows and tokens of the same texts."""
    settings = session.settings()
    if session.chat:
        return {each: prompts_of(each, torch.device("cpu")) for each in settings}
    batch, prompt = max(each.batch for each in settings), max(each.prompt for each in settings)
    rows = prompts_of(Setting(session.model, session.dtype, batch, prompt, 0), torch.device("cpu"))
    return {each: rows[: each.batch, : each.prompt] for each in settings}


def _judged(
    session: Session, model: Any, prompts: dict[Setting, Tensor], sides: dict[str, _Side], failures: dict[str, str]
) -> dict[str, Result]:
    """Each engine's error, of the text of a few rows; transformers' own is what they are judged beside."""
    setting, rows = max(prompts.items(), key=lambda each: each[0].batch)
    rows, new = rows[:JUDGED_ROWS], min(setting.new, JUDGED_NEW)
    reference = in_float64(model)
    plain = transformers_side(model)

    def chosen(texts: list[list[int]]) -> Tensor:
        return torch.cat([shares_of_best(reference, *row) for row in zip(rows, texts, strict=True)])

    def baseline() -> list[Tensor]:
        return [plain.logits(rows[0]), chosen(plain.generate(rows, new).token_ids)]

    def answer(side: _Side) -> list[Tensor]:
        return [side.logits(rows[0].tolist()), chosen(side.worker.generate(rows.tolist(), new)[1])]

    def fail(reason: str) -> list[Tensor]:
        raise RuntimeError(reason)

    expected = [logits_of(reference, rows[0]), torch.ones(len(rows) * new)]
    calls = {BASELINE: baseline} | {name: functools.partial(answer, side) for name, side in sides.items()}
    calls |= {name: functools.partial(fail, reason) for name, reason in failures.items()}
    judged = judge(EngineCase(session, setting, FORWARD), expected, calls)
    del judged[BASELINE]  # in this process, and not timed
    return judged


def _take_turns(turns: _Turns, session: Session, prompts: dict[Setting, Tensor], seconds: float) -> None:
    """Rounds of each setting, after one to warm up (who was judged has generated before); who fails on the way has a failure."""
    settings = session.settings()
    reads = _reader(session)

    def everybody(do: Callable[[_Side, Setting, list[list[int]]], Any], shift: int) -> None:
        names = list(turns.sides)
        for setting, name in itertools.product(settings, names[shift:] + names[:shift]):
            try:
                if name in turns.sides:
                    do(turns.sides[name], setting, prompts[setting].tolist())
            except CALL_ERRORS as error:
                turns.judged[name] = replace(turns.judged[name], failure=f"it cannot be timed: {first_line(error)}")
                del turns.sides[name]

    everybody(lambda side, setting, ids: side.worker.generate(ids, setting.new), 0)
    start, count = time.perf_counter(), 0
    while turns.sides and (count < MIN_ROUNDS or time.perf_counter() - start < _ROUNDS * seconds * len(turns.sides)):
        everybody(_Side.turn, count % len(turns.sides))
        time.sleep(_PAUSE)
        turns.reads += reads()
        count += 1


def _reader(session: Session) -> Callable[[], list[float]]:
    """Reads as many bytes as a token does, on as many threads, again and again; returns the seconds of the fastest way each time."""
    bytes_of_a_token = torch.empty(session.read_bytes // 4)
    prefer_huge_pages([bytes_of_a_token])  # as our weights lie
    calls = readers(bytes_of_a_token.fill_(1.0)).values()

    def read(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def reads() -> list[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(session.threads)
        try:
            return min(([read(call) for _ in range(_READS)] for call in calls), key=statistics.median)
        finally:
            torch.set_num_threads(before)

    return reads
