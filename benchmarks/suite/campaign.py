"""All that an hour on a rented GPU should do, in parts that each end in time and can be taken up again.

A part is one file in a folder, written after each case: `run_part` goes on where the last call stopped. `run_campaign` gives
each part a process of its own, so that a part that dies (an illegal address ends a process' CUDA context for good) or hangs
loses nothing of the others. At the end of a call all files are packed into one.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama_fast.benchmarks.engines.cases import EngineCase
from llama_fast.benchmarks.shapes import CPU_7M, LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape
from llama_fast.benchmarks.suite import run
from llama_fast.benchmarks.suite.comparison import QUICK_SECONDS, SECONDS, Case, release
from llama_fast.benchmarks.suite.pytest_groups import GROUPS, QUICK_GROUPS, REPORT_SECONDS, SuiteRuns, run_tests
from llama_fast.benchmarks.suite.record import Record, machine_folder
from llama_fast.benchmarks.suite.sweep import Sweep, run_sweep
from llama_fast.kernels.launch import gpu_of
from llama_fast.profiler.machine import machine
from llama_fast.profiler.measure.limits import Limits, measure_limits
from llama_fast.reports.jsonfile import read_json, write_json

LOG, PACKED = "log.txt", "campaign.zip"
"""What lies beside the parts' files: what all processes said, and all files as one."""

MOST_ATTEMPTS = 2
"""At a case whose process ended before it was done."""

ENGINES = "engines"
"""The part of `generate` that sets engines of other projects beside ours: on a CPU alone, and in processes of their own."""

_LEAST_SECONDS = 20.0  # that a part is begun for: its process needs 10 to get to its first case
_GRACE_SECONDS = 120.0  # past its deadline, before a part is ended: a case that compiles can take so long

_MODELS = {"profile-1b": LLAMA_3_2_1B, "profile-8b": LLAMA_3_1_8B}

_DECODING = ("norm_swiglu", "norm_qkv_rope", "attention_decode")
_FIRST_OPS = ("attention", "linear", "rms_norm", "cross_entropy", "linear_cross_entropy")


@dataclass(frozen=True)
class Part:
    """`seconds` are what a call gives it before the parts after it have had their turn."""

    name: str
    seconds: float


def parts() -> list[Part]:
    """In the order in which they are done: what matters most comes first, as the time may end anywhere."""
    ops = [stem.removeprefix("bench_") for stem in run.kernel_files()]
    ops.sort(key=lambda op: (_FIRST_OPS.index(op) if op in _FIRST_OPS else len(_FIRST_OPS), op))
    return [
        Part("limits", 90), Part("tests-gpu", 180), *(Part(op, 90) for op in _DECODING), Part("generate", 400),
        *(Part(op, 90) for op in ops if op not in _DECODING), Part("layer", 180), Part("prefill", 180), Part("train", 180),
        Part(ENGINES, 600), *(Part(name, 240) for name in _MODELS), Part("tests", 300), Part("sweep", 540),
    ]  # fmt: skip


Progress = Callable[[str, int, int], None]


def run_part(
    name: str, folder: Path, device: torch.device, *, quick: bool, deadline: float, progress: Progress
) -> bool:  # fmt: skip
    """Does a part, or what of it fits before `deadline` (of `time.monotonic`). Returns whether it is complete.

    Raises:
        GpuFailure: a kernel broke the CUDA context; what was measured before is in the part's file.
    """
    file = folder / f"{name}.json"
    if name == "limits":
        write_json(file, run.new_record(device, {"complete": True}, quick=quick))
    elif name in GROUPS:
        tests = read_json(file, SuiteRuns) if file.exists() else SuiteRuns(machine(device))
        groups = QUICK_GROUPS if quick else GROUPS[name]
        run_tests(tests, groups, deadline=deadline, save=lambda: write_json(file, tests), progress=progress)
    elif name == "sweep":
        _sweep(file, folder, device, quick=quick, deadline=deadline, progress=progress)
    elif name in _MODELS:
        _profile(file, CPU_7M if quick else _MODELS[name], device, quick=quick, progress=progress)
    else:
        _measure(name, file, folder, device, quick=quick, deadline=deadline, progress=progress)
    return is_complete(file)


def is_complete(file: Path) -> bool:
    """Whether a part's file is there, and says that nothing is missing."""
    if not file.exists():
        return False
    value = json.loads(file.read_text())
    return bool(value.get("complete", value.get("settings", {}).get("complete", True)))


def _measure(
    name: str, file: Path, folder: Path, device: torch.device, *, quick: bool, deadline: float, progress: Progress
) -> None:
    """The cases that the part's record does not have yet, one by one."""
    cases = _cases(name, device, quick)
    if file.exists():
        record = read_json(file, Record)
    else:
        settings = {"part": name, "quick": quick, "device": device.type, "complete": False, "attempts": {}}
        record = Record(machine(device), _limits(folder, device, quick), settings)
    _note_commit(record, device)
    done = {result.work_key for result in record.results}
    longest, measured = 0.0, None
    for number, case in enumerate(cases):
        if run.work_key(case) in done:
            continue
        start = time.monotonic()
        if _measured_with(case) != measured and start + longest > deadline:
            return
        progress(run.case_name(case), number, len(cases))
        _measure_case(case, record, file, device, quick=quick)
        longest, measured = max(longest, time.monotonic() - start), _measured_with(case)
    record.settings["complete"] = True
    write_json(file, record)


def _cases(name: str, device: torch.device, quick: bool) -> list[Case]:
    """Those of a part."""
    if name not in (*run.WHOLE, ENGINES):
        return run.kernel_cases(name, device, quick=quick)
    cases = run.find_cases(["generate" if name == ENGINES else name], None, device, quick=quick)
    return [case for case in cases if isinstance(case, EngineCase) == (name == ENGINES)]


def _measured_with(case: Case) -> Hashable:
    """What cases have in common that are measured as one: torn apart they would be measured again. A session of engines, and else
    the directions of a shape, as generating measures both its latencies at once."""
    return case.session if isinstance(case, EngineCase) else (case.op, case.shape)


def _note_commit(record: Record, device: torch.device) -> None:
    commit = machine(device)["commit"]
    warning = f"some of these results are of commit {commit}"
    if commit != record.machine["commit"] and warning not in record.warnings:
        record.warnings.append(warning)


def _measure_case(case: Case, record: Record, file: Path, device: torch.device, *, quick: bool) -> None:
    attempts = record.settings["attempts"]
    name = run.case_name(case)
    if attempts.get(name, 0) >= MOST_ATTEMPTS:
        record.results.extend(run.failed(case, f"its process ended {attempts[name]} times while this was measured"))
    else:
        attempts[name] = attempts.get(name, 0) + 1
        write_json(file, record)  # what ends this process leaves the attempt behind
        try:
            run.run_cases(record, [case], device, seconds=QUICK_SECONDS if quick else SECONDS)
        finally:
            write_json(file, record)


def _limits(folder: Path, device: torch.device, quick: bool) -> Limits:
    """Those of the part "limits", so that all parts' shares are of the same."""
    file = folder / "limits.json"
    return read_json(file, Record).limits if file.exists() else measure_limits(device, quick=quick)


def _sweep(file: Path, folder: Path, device: torch.device, *, quick: bool, deadline: float, progress: Progress) -> None:
    if file.exists():
        sweep = read_json(file, Sweep)
    else:
        gpu = gpu_of(device)
        sweep = Sweep(machine(device), gpu.arch, gpu.multiprocessors)
    if device.type != "cuda":
        sweep.failed, sweep.complete = ["there is no GPU to sweep plans on"], True
        write_json(file, sweep)
        return
    limits = _limits(folder, device, quick)
    run_sweep(
        sweep, device, limits, quick=quick, deadline=deadline, save=lambda: write_json(file, sweep), progress=progress
    )


def _profile(file: Path, shape: ModelShape, device: torch.device, *, quick: bool, progress: Progress) -> None:
    """Of a model with random weights, whose time goes where any model's of its shape does."""
    from llama_fast import profile

    with tempfile.TemporaryDirectory() as checkpoint:
        progress(f"writing {shape.name} with random weights", 0, 1)
        write_random_checkpoint(shape, Path(checkpoint), device)
        release()
        found = profile(
            checkpoint, device=device, prompt_tokens=16 if quick else 512, new_tokens=8 if quick else 128,
            rounds=2 if quick else 5, contexts=() if quick else (1024, 8192, 32768),
            against=() if quick else ("transformers", "transformers-static"), progress=lambda what: progress(what, 0, 1),
        )  # fmt: skip
    write_json(file, replace(found, model=f"{shape.name}, random weights"))  # not the folder's name


def write_random_checkpoint(shape: ModelShape, folder: Path, device: torch.device) -> None:
    """A model of a shape, in bfloat16 (float32 on a CPU), with the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    from llama_fast.benchmarks.models import build_model
    from llama_fast.engine.llm import EMBEDDED_MODEL
    from llama_fast.profiler.measure.sides import without_bars

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with without_bars():
        build_model(shape, device, dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(folder)


def require_same(folder: Path, device: torch.device, *, quick: bool) -> None:
    """Raises ValueError where the folder has results of another machine, or of a run that was quick where this one is not."""
    here = machine_folder(machine(device))
    for file in sorted(folder.glob("*.json")):
        value = json.loads(file.read_text())
        there, settings = machine_folder(value["machine"]), value.get("settings", {})
        if there != here:
            raise ValueError(f"{file} was measured on {there}, and this is {here}")
        if settings.get("quick", quick) != quick:
            raise ValueError(f"{file} was measured {'without' if quick else 'with'} --quick")


def run_campaign(
    folder: Path, chosen: Sequence[Part], *, device: str, minutes: float, quick: bool, tell: Callable[[str], None]
) -> None:
    """Each part in a process of its own, until all are complete or the minutes are over: first each for its share, then for what is left."""
    end = time.monotonic() + 60 * minutes
    full: set[str] = (
        set()
    )  # parts that had all the time there was: what is left of it is not enough for their next case
    for with_shares in (True, False):
        for part in chosen:
            file = folder / f"{part.name}.json"
            while not is_complete(file) and part.name not in full:
                left = end - time.monotonic()
                seconds = min(left, part.seconds) if with_shares else left
                if left < _LEAST_SECONDS:
                    break
                before = _written(file)
                tell(f"{part.name}: up to {seconds:.0f} s")
                ended = _run_process(part.name, folder, device, seconds, end, quick)
                tell(f"{part.name}: {'complete' if is_complete(file) else ended}")
                if ended == "out of time" and seconds == left:
                    full.add(part.name)
                if ended == "out of time" or _written(file) == before:
                    break
    pack(folder)


def _written(file: Path) -> int:
    """When it was written last."""
    return file.stat().st_mtime_ns if file.exists() else 0


def _run_process(name: str, folder: Path, device: str, seconds: float, end: float, quick: bool) -> str:
    """How it ended. Its output goes to LOG."""
    # starting takes its time as well, and the call has to end when it said it would
    own = max(1.0, min(seconds, end - time.monotonic() - REPORT_SECONDS))
    command = [
        sys.executable, "-m", "llama_fast", "bench", "campaign", "--out", str(folder), "--part", name, "--in-process",
        "--minutes", f"{own / 60:.3f}", "--device", device, *(["--quick"] if quick else []),
    ]  # fmt: skip
    file, log_file = folder / f"{name}.json", folder / LOG
    with log_file.open("a") as log:
        log.write(f"\n== {name}\n")
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        grace_ends = time.monotonic() + own + _GRACE_SECONDS
        try:
            code = process.wait(timeout=max(1.0, min(grace_ends, end) - time.monotonic()))
        except subprocess.TimeoutExpired:
            if grace_ends > end:
                _forgive(file)
            return "out of time"
        except BaseException:  # Ctrl-C
            _forgive(file)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started: nothing may run beside the next part
            process.wait()
    if code in (0, 3):
        return "complete" if code == 0 else "out of time"
    said = log_file.read_text(errors="replace").split(f"== {name}\n")[-1].split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    return f"ended with status {code}: {last[:300]}"


def _forgive(file: Path) -> None:
    """What was being measured is not to blame: the call was over, or interrupted."""
    value = json.loads(file.read_text()) if file.exists() else {}
    if value.get("running"):
        sweep = read_json(file, Sweep)
        sweep.running = None
        write_json(file, sweep)
    elif value.get("settings", {}).get("attempts") and not value["settings"].get("complete"):
        record = read_json(file, Record)
        name, count = record.settings["attempts"].popitem()  # the last that was begun
        record.settings["attempts"] |= {name: count - 1} if count > 1 else {}
        write_json(file, record)


def pack(folder: Path) -> Path:
    """All files of a campaign as one."""
    packed = folder / PACKED
    partial = packed.with_name(f"{PACKED}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith(PACKED):
                archive.write(file, file.name)
    os.replace(partial, packed)
    return packed
