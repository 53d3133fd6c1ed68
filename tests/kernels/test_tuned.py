"""The table of tuned plans: what it may hold, what an entry changes, and what a sweep does. No GPU is needed."""

import json
import math
import time
import timeit
from types import SimpleNamespace

import pytest
import torch

from llama_fast import ops
from llama_fast.benchmarks.peers import BASELINE, OURS
from llama_fast.benchmarks.suite import sweep as sweeping
from llama_fast.benchmarks.suite.candidates import SPILL_BOUND, candidates, fault, gpu_of_key, launches
from llama_fast.benchmarks.suite.comparison import FORWARD, OpCase, Problem
from llama_fast.kernels import reference, tuned
from llama_fast.kernels.binary import inspect_plan
from llama_fast.kernels.launch import GPUS, INTERPRETED, INTERPRETER
from llama_fast.kernels.triton_compat import HAS_TRITON
from llama_fast.kernels.tuned import Entry, asked, candidate, read_table, tuned_plan, write_table
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.work import Work
from llama_fast.reports.jsonfile import write_json
from tests.parity import compiles_kernels

interpreted = pytest.mark.skipif(not INTERPRETED, reason="without a GPU, plans are only launched in the interpreter")

KEYS = [
    (op, "sm_90", 132, torch.bfloat16, size)
    for op, size in (
        ("linear", (4096, 4096, 14336)), ("linear_few_rows", (1, 4096, 14336)), ("linear_few_rows", (16, 4096, 4096)),
        ("norm_qkv_rope", (1, 48, 64, 4096)), ("norm_swiglu", (16, 1, 14336, 4096)), ("attention", (128, 8192, 1, 0)),
        ("attention_decode", (32, 8, 64)), ("rms_norm", (4096,)), ("softmax", (131072,)),
    )
]  # fmt: skip
LIMITS = Limits(1e10, 1e10, {"float32": 1e11}, 1e-6, None, 1 << 25)


def entry(key, plan, **changed) -> Entry:
    values = dict(
        op=key[0], arch=key[1], multiprocessors=key[2], dtype=str(key[3]).removeprefix("torch."), size=key[4], plan=plan,
        gpu="NVIDIA H100 80GB HBM3", cases=("a case",), seconds=1e-5, arithmetic_seconds=1.1e-5, error=1e-3, bound=2e-3,
    )  # fmt: skip
    return Entry(**values | changed)


ENTRIES = read_table(tuned.TABLE)


@pytest.mark.parametrize("line", ENTRIES, ids=lambda line: f"{line.op} {line.size} {line.arch}")
def test_entries_are_right_and_their_binaries_do_not_spill(line):
    assert line.dtype in ("bfloat16", "float16")
    assert line.error <= line.bound and line.seconds < (1 - sweeping.MINIMUM_GAIN) * line.arithmetic_seconds
    gpu = gpu_of_key(line.key)
    assert line.plan in candidates(line.key, gpu)
    with asked() as keys:
        launches(line.key, gpu)
    assert line.key in keys
    if HAS_TRITON and not INTERPRETED:
        assert fault(line.key, line.plan, gpu) is None


def test_the_table_has_each_key_once():
    assert len({line.key for line in ENTRIES}) == len(ENTRIES)


def test_table_file(tmp_path):
    file = tmp_path / "table.json"
    lines = [entry(KEYS[0], dict(block_m=64)), entry(KEYS[7], dict(block_m=1))]
    write_table(file, lines)
    assert read_table(file) == lines
    assert len(file.read_text().splitlines()) == 4, "an entry a line"
    for broken in ("{", "[]", '{"schema": 1, "entries": [{"op": "linear"}]}', '{"schema": 9, "entries": []}'):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"is no table of tuned plans|is of schema 9"):
            read_table(file)


def described(plans):
    """All of a plan that can differ: tensors by their shapes."""
    return [
        (
            plan.kernel.__name__, plan.grid, plan.num_warps, plan.num_stages, plan.options, plan.pdl, plan.constants,
            {name: getattr(value, "shape", value) for name, value in plan.arguments.items()},
        )
        for plan in plans
    ]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]} {key[4]}")
def test_an_entry_changes_its_plan_and_nothing_else(key):
    gpu = gpu_of_key(key)
    present = described(launches(key, gpu))
    other = (*key[:4], tuple(2 * n if n == max(key[4]) else n for n in key[4]))
    present_of_other = described(launches(other, gpu))
    changed = 0
    for plan in candidates(key, gpu):
        with candidate(key, plan):
            changed += described(launches(key, gpu)) != present
            assert described(launches(other, gpu)) == present_of_other
    assert changed >= len(candidates(key, gpu)) - 1, "one of them may be the arithmetic's own"
    assert described(launches(key, gpu)) == present, "and it is gone when it is over"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0]} {key[4]}")
def test_candidates_fill_the_plan(key):
    """What a candidate names is what is launched."""
    gpu, plan = gpu_of_key(key), candidates(key, gpu_of_key(key))[-1]
    with candidate(key, plan):
        launch = launches(key, gpu)[0]
    settings = {name.lower(): value for name, value in launch.constants.items()}
    settings |= {"num_warps": launch.num_warps} | (
        {} if "num_stages" in settings else {"num_stages": launch.num_stages}
    )
    settings |= {"block_m": settings.get("block_i", settings.get("block_m"))}
    settings |= {"row_bytes": 2 * settings.get("block_k", 0), "splits": launch.grid[-1]}
    settings |= {"programs_per_multiprocessor": math.ceil(settings.get("max_splits", 0) * 8 / 132)}
    assert {name: settings[name] for name in plan} == plan


def test_a_key_of_rms_norm_is_judged_with_a_residual_too():
    plain, with_residual = launches(KEYS[7], gpu_of_key(KEYS[7]))
    assert plain.arguments["p_residual"] is None and with_residual.arguments["p_residual"] is not None


@compiles_kernels
@pytest.mark.parametrize("key", [KEYS[4], KEYS[7]], ids=lambda key: key[0])
def test_a_plan_that_spills_is_found(key, monkeypatch):
    gpu = gpu_of_key(key)
    assert fault(key, candidates(key, gpu)[0], gpu) is None
    bad = dict(block_m=8, block_n=4096, num_warps=4)  # 256 elements a thread
    if key[0] == "norm_swiglu":
        bad = dict(block_p=32, row_bytes=256, num_stages=16)  # 300 KB
    with candidate(key, bad):
        report = inspect_plan(launches(key, gpu)[0], gpu)
    assert report.spill_bytes > SPILL_BOUND or report.shared_bytes > gpu.shared_bytes
    assert fault(key, bad, gpu) is not None


def test_lookup_is_cheap():
    gpu = GPUS["sm_90"]
    seconds = min(
        timeit.repeat(lambda: tuned_plan("linear", gpu, torch.bfloat16, (8192, 4096, 4096)), number=2000, repeat=20)
    )
    assert seconds / 2000 < 0.5e-6 * 4, "0.1 us; four times the bound, for a machine that others use too"


def small_softmax(broken: tuple[int, ...] = ()):
    """A case of 64 rows, whose implementation is wrong under plans of `broken` rows a program."""

    def ours(x):
        key = ("softmax", INTERPRETER.arch, INTERPRETER.multiprocessors, x.dtype, (x.shape[-1],))
        y = ops.softmax(x)
        plan = tuned._plans.get(key)
        return 1.01 * y if plan and plan["block_m"] in broken else y

    peers = {OURS: ours, BASELINE: lambda x: torch.softmax(x, -1)}
    return OpCase("softmax", "64 x 256", torch.float32, FORWARD, lambda: peers, lambda device: _rows(64, 256, device))


@interpreted
def test_a_sweep_judges_each_candidate_and_takes_what_is_faster(monkeypatch):
    """In the interpreter time goes with the number of programs: the more rows in one, the faster."""
    case = small_softmax(broken=(16,))
    monkeypatch.setattr(sweeping, "fault", lambda key, plan, gpu: None)
    [(key, cases)] = sweeping.keys_of([case], torch.device("cpu"), []).items()
    assert key == ("softmax", "sm_90", 2, torch.float32, (256,)) and cases == [case]
    slow, fast, wrong = (dict(block_m=block_m, block_n=256, num_warps=4) for block_m in (2, 64, 16))
    refused = dict(block_m=3, block_n=256, num_warps=4)  # Triton's tiles are powers of two
    monkeypatch.setattr(sweeping, "candidates", lambda key, gpu: [slow, fast, wrong, refused])
    found = sweeping.sweep_key(key, cases, torch.device("cpu"), LIMITS)
    assert found.entry is not None and found.entry.plan == fast
    assert found.entry.seconds < 0.98 * found.entry.arithmetic_seconds and found.entry.error <= found.entry.bound
    failures = {each.plan["block_m"]: each.failure for each in found.tried if each.failure}
    assert failures[16].startswith("FAIL: error") and "raised" in failures[3]
    assert not any(each.seconds for each in found.tried if each.failure)

    monkeypatch.setattr(sweeping, "candidates", lambda key, gpu: [slow])
    monkeypatch.setattr(sweeping, "AT_ONCE", 1)
    measure, at_once = sweeping._measure, []
    monkeypatch.setattr(sweeping, "_measure", lambda *a: at_once.append(len(a[2])) or measure(*a))
    assert sweeping.sweep_key(key, cases, torch.device("cpu"), LIMITS).entry is None
    assert at_once == [1, 1, 2], "the first round a few at a time: each plan's graph holds its outputs"


@interpreted
def test_a_sweep_is_taken_up_again(monkeypatch):
    """A key that ended its process is named and left out; a deadline ends the sweep between two keys; what raises is named."""
    other = small_softmax()
    other = OpCase("softmax", "16 x 128", other.dtype, FORWARD, other.peers, lambda device: _rows(16, 128, device))
    broken = OpCase("softmax", "broken", other.dtype, FORWARD, other.peers, lambda device: torch.empty(-1))
    files = [SimpleNamespace(cases=lambda device, quick: [small_softmax(), other, broken])]
    monkeypatch.setattr(sweeping, "FILES", files)
    monkeypatch.setattr(sweeping, "candidates", lambda key, gpu: [])
    saved = []

    def go(sweep, seconds):
        sweeping.run_sweep(
            sweep, torch.device("cpu"), LIMITS, quick=True, deadline=time.monotonic() + seconds,
            save=lambda: saved.append(sweep.running), progress=lambda *_: None,
        )  # fmt: skip

    sweep = sweeping.Sweep({}, INTERPRETER.arch, INTERPRETER.multiprocessors, running="softmax 256")
    go(sweep, 0)
    assert not sweep.keys and not sweep.complete and saved == []
    go(sweep, 60)
    go(sweep, 60)
    assert len(sweep.failed) == 2, "what fails is named once"
    assert (
        [key.size for key in sweep.keys] == [(128,)] and sweep.complete and saved == ["softmax 128", None, None, None]
    )
    assert sweep.failed[0] == "softmax 256" and sweep.failed[1].startswith("softmax, broken, float32, forward: ")


def _rows(m, n, device):
    x = torch.randn(m, n, device=device)
    return Problem((x,), lambda x: reference.softmax(x, -1), Work.moving(reads=[x], writes=[x]))


def test_merge(tmp_path):
    table, file = tmp_path / "table.json", tmp_path / "sweep.json"
    lost, kept = entry(KEYS[0], dict(block_m=64)), entry(KEYS[1], dict(block_n=8))
    write_table(table, [lost, kept])
    won = entry(KEYS[7], dict(block_m=1))
    keys = [sweeping.KeySweep(line.op, line.size, [], [], line if line is won else None) for line in (lost, won)]
    write_json(file, sweeping.Sweep({}, "sm_90", 132, True, None, keys))
    assert sweeping.merge([file], table) == 2
    assert {line.key for line in read_table(table)} == {kept.key, won.key}
    assert json.loads(table.read_text())["schema"] == tuned.SCHEMA
