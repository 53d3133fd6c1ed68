"""The suite: who is wrong has no speed, peers can't spoil one another, work and floors as by hand, timing in turns."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast import benchmarks, ops
from llama_fast.benchmarks import peers
from llama_fast.benchmarks.peers import BASELINE, OURS, Implementations, Unavailable
from llama_fast.benchmarks.report import tables
from llama_fast.benchmarks.suite import comparison
from llama_fast.benchmarks.suite.comparison import FORWARD, TRAINING, OpCase
from llama_fast.benchmarks.suite.record import Record, Result, Skipped
from llama_fast.kernels.triton_compat import triton
from llama_fast.profiler.measure import timing
from llama_fast.profiler.measure.limits import Limits
from llama_fast.profiler.measure.timing import Timing, time_interleaved
from llama_fast.profiler.measure.work import Work

CPU = torch.device("cpu")
LIMITS = Limits(20e9, 10e9, {"float32": 1e11, "bfloat16": 2e11, "float16": 1e9}, 1e-6, None, 32 << 20)
OP_FILES = ("attention", "attention_decode", "cross_entropy", "layer_norm", "linear", "linear_cross_entropy",
            "norm_qkv_rope", "norm_swiglu", "rms_norm", "rope", "softmax", "swiglu")  # fmt: skip


def cases_of(device: torch.device, *, quick: bool) -> list[OpCase]:
    modules = [importlib.import_module(f"{benchmarks.__name__}.bench_{name}") for name in OP_FILES]
    return [case for module in modules for case in module.cases(device, quick=quick)]


def case_of(op: str, direction: str = FORWARD) -> OpCase:
    """The first quick one."""
    return next(case for case in cases_of(CPU, quick=True) if case.op == op and case.direction == direction)


def measured(case: OpCase, *only: str) -> dict[str, Result]:
    there = {name: peer for name, peer in case.peers().items() if not only or name in only}
    results = replace(case, peers=lambda: there).measure(CPU, LIMITS, seconds=0.0)
    return {result.implementation: result for result in results}


def right(x: Tensor) -> Tensor:
    return x.softmax(-1)


def softmax_by(**implementations: Callable[..., Any] | Unavailable) -> Callable[[], Implementations]:
    return lambda: {BASELINE: right} | implementations


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * dy  # without the sum over the row


# Judging


def test_a_wrong_kernel_fails_and_has_no_speed() -> None:
    case = replace(case_of("softmax"), peers=softmax_by(wrong=lambda x: 1.001 * right(x)))
    results = measured(case)
    assert results["wrong"].failure is not None and results["wrong"].failure.startswith("FAIL: error 1.0e-03 exceeds")
    assert results["wrong"].samples == []
    assert results[BASELINE].failure is None and len(results[BASELINE].samples) >= 10


def test_a_wrong_gradient_fails() -> None:
    case = replace(case_of("softmax", TRAINING), peers=softmax_by(wrong=WrongBackward.apply))
    failure = measured(case)["wrong"].failure
    assert failure is not None and failure.startswith("FAIL: error") and "of output 1" in failure
    assert measured(replace(case, direction=FORWARD))["wrong"].failure is None


def test_pytest_says_fail_and_prints_no_speed(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from llama_fast.benchmarks.conftest import *\n")
    (tmp_path / "bench_wrong.py").write_text("""
from dataclasses import replace
from llama_fast.benchmarks import bench_softmax
from llama_fast.benchmarks.peers import BASELINE, OURS, Unavailable
from llama_fast.benchmarks.suite.comparison import speed_test

test_speed = speed_test

def there():
    return {
        OURS: lambda x: 1.001 * x.softmax(-1), BASELINE: lambda x: x.softmax(-1), "other": Unavailable("other is not here")
    }

def cases(device, *, quick):
    return [replace(bench_softmax.cases(device, quick=quick)[0], peers=there)]
""")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        "--quick",
        "-rs",
        "--benchmark-json",
        str(tmp_path / "out.json"),
    ]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [*command, f"--rootdir={root}", "-c", str(root / "pyproject.toml"), "-p", "no:cacheprovider"],
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
        # in a worker of xdist pytest-benchmark would think that it is in one
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "FAIL: error 1.0e-03 exceeds" in done.stdout and "other is not here" in done.stdout
    table = done.stdout[done.stdout.index("benchmark '") :]
    assert "PyTorch" in table and OURS not in table
    (timed,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert timed["group"].startswith("softmax, ") and timed["stats"]["rounds"] >= 10
    assert timed["extra_info"]["relative_error"] <= timed["extra_info"]["error_bound"]


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel\nand a trace"), KeyError("no kernel"), triton.TritonError("no kernel")]
)
def test_a_peer_that_raises_does_not_stop_the_others(error: Exception) -> None:
    def raising(x: Tensor) -> Tensor:
        raise error

    results = measured(replace(case_of("softmax"), peers=softmax_by(raising=raising, other=right)))
    failure = results["raising"].failure
    assert failure is not None and type(error).__name__ in failure and "no kernel" in failure and "trace" not in failure
    assert results["raising"].samples == [] and results["other"].samples and results[BASELINE].samples


def test_a_peer_that_raises_while_it_is_timed_does_not_stop_the_others() -> None:
    calls = []

    def raising(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return right(x)

    results = measured(replace(case_of("softmax"), peers=softmax_by(raising=raising, other=right)))
    assert results["raising"].failure == "it cannot be timed: out of memory" and results["raising"].samples == []
    assert results["other"].samples and results[BASELINE].samples


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), triton.TritonError("out of memory")])
def test_an_error_before_anybody_is_called_is_everybodys(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    tried = []

    def raising(calls: Any, *_: Any, **__: Any) -> Any:
        tried.append(1)
        if len(tried) > 1:
            raise KeyboardInterrupt  # instead of trying for ever
        raise error

    monkeypatch.setattr(comparison, "time_interleaved", raising)
    results = measured(replace(case_of("softmax"), peers=softmax_by(other=right)))
    assert {result.failure for result in results.values()} == {"it cannot be timed: out of memory"}


def test_a_loss_in_bfloat16_has_no_more_room_than_its_eps() -> None:
    """PyTorch's error in a single number may be nothing at all; 3 eps for that would be 2.3 %."""
    case = replace(case_of("cross_entropy"), dtype=torch.bfloat16)
    expected = torch.tensor(11.7, dtype=torch.float64)
    results = comparison.judge(case, [expected], {BASELINE: lambda: expected, "off": lambda: 1.01 * expected})
    assert results[BASELINE].failure is None and str(results["off"].failure).startswith("FAIL")
    float32 = replace(case, dtype=torch.float32)
    assert (
        comparison.judge(float32, [expected], {BASELINE: lambda: expected, "off": lambda: (1 + 3e-7) * expected})[
            "off"
        ].failure
        is None
    )


def test_without_the_baseline_ours_is_not_judged_beside_itself() -> None:
    def raising(x: Tensor) -> Tensor:
        raise RuntimeError

    def ours(x: Tensor) -> Tensor:
        return 1.001 * right(x)

    case = replace(case_of("softmax"), peers=lambda: {BASELINE: raising, OURS: ours})
    failure = measured(case)[OURS].failure
    assert failure is not None and failure.startswith("FAIL")


def test_a_peer_that_overwrites_its_inputs_spoils_nobody() -> None:
    def overwriting(x: Tensor) -> Tensor:
        y = right(x)
        x.detach().zero_()
        return y

    case = replace(case_of("softmax"), peers=lambda: {"overwriting": overwriting, BASELINE: right, OURS: ops.softmax})
    inputs = []

    def build(device: torch.device) -> comparison.Problem:
        problem = case.build(device)
        inputs.append((problem.inputs[0], problem.inputs[0].clone()))
        return problem

    results = measured(replace(case, build=build))
    assert [result.failure for result in results.values()] == [None] * 3
    assert results["overwriting"].note == comparison._OVERWRITES and results[OURS].note is None
    assert torch.equal(*inputs[0])  # timing, too, was on a copy


def test_what_an_op_writes_into_its_cache_is_judged() -> None:
    case = case_of("norm_qkv_rope")
    there = case.peers()
    plain = there[BASELINE]
    assert not isinstance(plain, Unavailable)

    def forgetful(*inputs: Any) -> Any:  # writes into copies
        return plain(*inputs[:5], *(cache.clone() for cache in inputs[5:7]), inputs[7])

    results = measured(replace(case, peers=lambda: {BASELINE: plain, "forgetful": forgetful}))
    failure = results["forgetful"].failure
    assert failure is not None and "FAIL" in failure and ("of output 1" in failure or "of output 2" in failure)


def test_the_unavailable_are_listed_by_name_once() -> None:
    cases = [replace(case_of("softmax"), peers=softmax_by(gone=Unavailable("it is not installed")))] * 2
    assert comparison.unavailable(cases) == [Skipped("softmax", "gone", "it is not installed")]


def test_no_backend_of_sdpa_is_made_to_repeat_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a decoding step that would be most of its time."""
    q, k, v, *others = case_of("attention_decode").build(CPU).inputs
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((k, v, options.get("enable_gqa", False)))
        return q

    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = peers.attention_decode(math_bytes=1.0)
    for name in ("SDPA flash", "SDPA cuDNN", "SDPA efficient", "SDPA math"):
        peer = there[name]
        assert not isinstance(peer, Unavailable) and peer(q, k, v, *others).shape == q.shape
    assert len(seen) == 4 and all(a is k and b is v and not repeats for a, b, repeats in seen)


def test_liger_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    named = {
        (each.op, each.reason)
        for each in comparison.unavailable(cases_of(CPU, quick=True))
        if each.implementation == "Liger"
    }
    assert ("rms_norm", "liger-kernel is not installed") in named and len(named) == 8


# The files


def test_every_op_has_a_benchmark() -> None:
    for quick in (False, True):
        assert {case.op for case in cases_of(CPU, quick=quick)} == set(ops.__all__)
        assert {case.op for case in cases_of(torch.device("cuda"), quick=quick)} == set(ops.__all__)
    files = {path.stem.removeprefix("bench_") for path in Path(peers.__file__).parent.glob("bench_*.py")}
    assert files >= set(OP_FILES) | set(ops.__all__) - {"geglu"}  # which is in swiglu's


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_no_two_cases_have_one_name(device: str, quick: bool) -> None:
    cases = cases_of(torch.device(device), quick=quick)
    assert len({(case.op, case.shape, case.dtype, case.direction) for case in cases}) == len(cases)


@pytest.mark.parametrize("case", cases_of(CPU, quick=True), ids=lambda case: f"{case.op} {case.shape} {case.direction}")
def test_every_quick_case_runs_and_ours_is_right(case: OpCase) -> None:
    names = [name for name in case.peers() if name.startswith(OURS) or name == BASELINE]
    results = measured(case, *names)
    assert set(results) == set(names) and OURS in names
    for result in results.values():
        assert result.failure is None and len(result.samples) >= 10
        assert result.error is not None and result.bound is not None and result.error <= result.bound
        assert result.floor_s > 0


# Work


@pytest.mark.parametrize(
    ("op", "direction", "work"),
    [
        ("rms_norm", FORWARD, Work(4 * (128 * 2048 + 2048), 4 * 128 * 2048)),
        ("rms_norm", TRAINING, Work(4 * (3 * 128 * 2048 + 2 * 2048), 4 * (2 * 128 * 2048 + 2048))),
        # four query heads and one of keys and values; query i attends to i + 1 keys
        ("attention", FORWARD, Work(4 * 6 * 128 * 64, 4 * 4 * 128 * 64, 4 * (128 * 129 // 2) * 4 * 64)),
        ("attention", TRAINING, Work(4 * 20 * 128 * 64, 4 * 10 * 128 * 64, 14 * (128 * 129 // 2) * 4 * 64)),
        ("attention_decode", FORWARD, Work(4 * (32 * 64 + 2 * 8 * 1024 * 64), 4 * 32 * 64, 4 * 1024 * 32 * 64)),
        ("cross_entropy", FORWARD, Work(4 * 32 * 32000 + 8 * 32, 4)),
        ("cross_entropy", TRAINING, Work(4 * 32 * 32000 + 8 * 32, 4 + 4 * 32 * 32000)),
        ("linear", FORWARD, Work(4 * (768 + 768 * 768 + 768), 4 * 768, 2 * 768 * 768)),  # o, with the residual
        ("linear_cross_entropy", TRAINING, Work(
            4 * (32 * 768 + 4000 * 768) + 8 * 32, 4 + 4 * (32 * 768 + 4000 * 768), 6 * 32 * 4000 * 768
        )),
        ("norm_qkv_rope", FORWARD, Work(4 * (768 + 768 + 2304 * 768 + 2 * 64) + 8, 4 * 2304, 2 * 768 * 2304)),
        ("norm_swiglu", FORWARD, Work(4 * (768 + 768 + 4096 * 768), 4 * 2048, 2 * 768 * 4096)),
        ("rope", TRAINING, Work(2 * 4 * 128 * 64 * (40 + 2), 2 * 4 * 128 * 64 * 40)),
        ("swiglu", TRAINING, Work(4 * 5 * 128 * 2048, 4 * 3 * 128 * 2048)),
    ],
)  # fmt: skip
def test_work_is_as_counted_by_hand(op: str, direction: str, work: Work) -> None:
    assert case_of(op, direction).build(CPU).work == work


def test_the_floor_is_the_larger_of_memory_and_arithmetic() -> None:
    # 2 GB in pairs at the copy's 10 GB/s, 3 GB more at the read's 20 GB/s; 1e10 FLOPs at 1e11/s
    work = Work(read=4_000_000_000, written=1_000_000_000, flops=10**10)
    assert LIMITS.memory_floor_s(work) == pytest.approx(0.2 + 0.15)
    assert LIMITS.compute_floor_s(work, torch.float32) == pytest.approx(0.1)
    assert LIMITS.floor_s(work, torch.float32) == pytest.approx(0.35)
    assert LIMITS.floor_s(replace(work, flops=10**11), torch.float32) == pytest.approx(1.0)
    assert LIMITS.floor_s(replace(work, flops=10**11), torch.bfloat16) == pytest.approx(0.5)


def test_rates_of_a_result() -> None:
    result = Result(
        "op", "s", "float32", FORWARD, OURS, [2.0, 1.0, 4.0], read=3 * 10**9, written=10**9, flops=10**12, floor_s=0.5
    )
    assert result.gigabytes_per_s == pytest.approx(2.0) and result.teraflops == pytest.approx(0.5)
    assert result.share_of_limit == pytest.approx(0.25)


def test_arithmetic_faster_than_its_limit_is_told_though_a_cache_holds_the_work() -> None:
    """The limit was measured while something else ran: no cache makes products faster."""
    result = Result("op", "s", "float32", FORWARD, OURS, [1e-3], read=1 << 20, flops=2 * 10**8, floor_s=2e-3)
    assert len(tables._beyond(Record({}, LIMITS, {}, [result]))) == 1
    assert not tables._beyond(Record({}, LIMITS, {}, [replace(result, flops=0)]))


# Timing


def test_implementations_take_turns_and_every_sample_is_kept() -> None:
    order: list[str] = []

    def named(name: str) -> timing.Call:
        def call() -> None:
            order.append(name)
            time.sleep(1.5 * timing._SAMPLE_SECONDS)  # so that a sample is one call

        return call

    timed = time_interleaved({name: named(name) for name in "abc"}, CPU, seconds=0.0, min_samples=4)
    assert "".join(order[-12:]) == "abcbcacababc"
    for each in timed.values():
        assert len(each.samples) == 4 and min(each.samples) >= 1.5 * timing._SAMPLE_SECONDS
    assert not any(each.waits for each in timed.values())


def test_a_short_call_is_repeated_within_a_sample() -> None:
    calls = []
    timed = time_interleaved({"a": lambda: calls.append(1)}, CPU, seconds=0.0, min_samples=3)
    assert len(timed["a"].samples) == 3 and timed["a"].median < 1e-4
    assert len(calls) > 3 * 20


def test_nothing_to_time() -> None:
    assert time_interleaved({}, CPU) == {}


def test_quantiles_and_spread() -> None:
    samples = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 6.0))
    assert (samples.median, samples.p20, samples.p80) == (3.5, 2.0, 5.0)
    assert samples.spread == pytest.approx(3 / 3.5) and samples.is_noisy
    assert not Timing((1.0, 1.0, 1.001)).is_noisy
