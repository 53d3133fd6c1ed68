"""Comparing two result files: what must be found, and what must not."""

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llama_fast.benchmarks import bench_rms_norm
from llama_fast.benchmarks.suite.compare import Comparison, compare
from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.cli.main import app
from llama_fast.profiler.measure.limits import Limits
from llama_fast.reports.jsonfile import write_json

LIMITS = Limits(1e10, 1e10, {"float32": 1e11, "bfloat16": 1e11}, 1e-6, None, 1 << 25)
GPU = dict(gpu="NVIDIA H100", processor="x86", threads=8, versions={"torch": "2.11"})


def record(
    seed: int, *, noise: float = 0.01, samples: int = 50, factor: Callable[[str, str], float] = lambda op, name: 1.0
) -> Record:
    """Three ops by three implementations, timed in turns: what the machine does to one round it does to all of it."""
    chance = random.Random(seed)
    results = []
    for op in ("rms_norm", "attention", "linear"):
        machine = [math.exp(chance.gauss(0, noise)) for _ in range(samples)]
        for name, seconds in (("llama-fast", 1e-4), ("PyTorch", 2e-4), ("torch.compile", 1.5e-4)):
            own = [seconds * factor(op, name) * each * math.exp(chance.gauss(0, noise)) for each in machine]
            results.append(Result(op, "8192 x 4096", "bfloat16", "forward", name, samples=own))
    return Record(dict(GPU), LIMITS, {}, results)


def names(found: Comparison) -> set[str]:
    return {f"{change.after.op} {change.after.implementation}" for change in found.slower}


@pytest.mark.parametrize(("noise", "samples"), [(0.003, 10), (0.02, 50), (0.05, 200)])
def test_finds_a_planted_slow_down_and_nothing_else(noise: float, samples: int) -> None:
    def planted(op: str, name: str) -> float:
        return 1.2 if (op, name) == ("attention", "llama-fast") else 1.0

    for seed in range(5):
        before = record(seed, noise=noise, samples=samples)
        found = compare(before, record(100 + seed, noise=noise, samples=samples, factor=planted))
        assert names(found) == {"attention llama-fast"} and not found.faster and not found.together
        assert found.is_regression
        assert found.slower[0].by_clock.ratio == pytest.approx(1.2, rel=0.03)
        assert found.unchanged == 8


@pytest.mark.parametrize("noise", [0.003, 0.02, 0.05])
def test_silent_on_two_runs_of_the_same(noise: float) -> None:
    for seed in range(10):
        found = compare(record(seed, noise=noise), record(100 + seed, noise=noise))
        assert not found.is_regression and not found.faster and found.unchanged == 9


def test_a_slower_machine_is_no_regression() -> None:
    found = compare(record(1), record(2, factor=lambda op, name: 1.3))
    assert not found.is_regression and len(found.together) == 9
    assert found.drift == pytest.approx(1.3, rel=0.02)
    assert len(compare(record(1), record(2, factor=lambda op, name: 1.3), absolute=True).slower) == 9


def test_a_slow_down_on_a_slower_machine_is_found() -> None:
    found = compare(record(1), record(2, factor=lambda op, name: 1.1 * (1.2 if name == "llama-fast" else 1.0)))
    assert names(found) == {"rms_norm llama-fast", "attention llama-fast", "linear llama-fast"}


def test_a_variant_of_ours_excuses_nothing() -> None:
    """`llama-fast paged` is slowed by the same change as `llama-fast`."""

    def renamed(found: Record) -> Record:
        results = [
            dataclasses.replace(each, implementation=each.implementation.replace("torch.compile", "llama-fast paged"))
            for each in found.results
        ]
        return dataclasses.replace(found, results=results)

    before, after = record(1), record(2, factor=lambda op, name: 1.0 if name == "PyTorch" else 1.05)
    assert not any("PyTorch" in name for name in names(compare(renamed(before), renamed(after))))
    assert len(compare(renamed(before), renamed(after)).slower) == 6


def test_a_peer_that_changed_excuses_nothing() -> None:
    """As a release of PyTorch may: what stayed as it was is what ours is set beside."""
    changed = {"llama-fast": 1.2, "torch.compile": 2.0}
    found = compare(record(1), record(2, factor=lambda op, name: changed.get(name, 1.0)))
    assert {"rms_norm llama-fast", "attention llama-fast", "linear llama-fast"} <= names(found)


def test_a_faster_machine_hides_nothing() -> None:
    found = compare(record(1), record(2, factor=lambda op, name: 1.0 if name == "llama-fast" else 1 / 1.2))
    assert {change.after.implementation for change in found.behind} == {"llama-fast"} and len(found.behind) == 3
    assert not found.is_regression


def test_what_is_too_noisy_to_tell_is_counted() -> None:
    assert compare(record(1), record(2)).blind == 0
    assert compare(record(1, samples=5, noise=0.1), record(2, samples=5, noise=0.1)).blind == 9


def test_the_minimum_is_stated_and_can_be_set() -> None:
    before, after = (
        record(1, noise=0.001),
        record(2, noise=0.001, factor=lambda op, name: 1.02 if op + name == "linearllama-fast" else 1),
    )
    assert compare(before, after).minimum == 0.03 and not compare(before, after).slower
    assert names(compare(before, after, minimum=0.01)) == {"linear llama-fast"}
    on_cpu = {key: value for key, value in GPU.items() if key != "gpu"}
    assert (
        compare(dataclasses.replace(before, machine=on_cpu), dataclasses.replace(after, machine=on_cpu)).minimum == 0.1
    )


def test_what_fails_is_new_or_gone() -> None:
    before, after = record(1), record(2)
    after.results[0] = dataclasses.replace(after.results[0], samples=[], failure="FAIL: error 1e-1 exceeds 1e-3")
    before.results[1] = dataclasses.replace(before.results[1], samples=[], failure="it raised RuntimeError: no")
    del before.results[2], after.results[3]
    found = compare(before, after)
    assert found.newly_failing == [after.results[0]]
    assert found.repaired == ["rms_norm, 8192 x 4096, bfloat16, forward, PyTorch"]
    assert found.new == ["rms_norm, 8192 x 4096, bfloat16, forward, torch.compile"]
    assert found.gone == ["attention, 8192 x 4096, bfloat16, forward, llama-fast"]
    assert found.is_regression and not found.slower


def test_what_a_peer_loses_is_told_and_is_no_regression() -> None:
    after = record(2, factor=lambda op, name: 1.3 if name == "PyTorch" else 1.0)
    after.results[2] = dataclasses.replace(after.results[2], samples=[], failure="it raised RuntimeError: no")
    found = compare(record(1), after)
    assert names(found) == {f"{op} PyTorch" for op in ("rms_norm", "attention", "linear")}
    assert [each.implementation for each in found.newly_failing] == ["torch.compile"]
    assert not found.is_regression


def test_two_machines() -> None:
    other = dataclasses.replace(record(2), machine=GPU | dict(gpu="NVIDIA H200"))
    with pytest.raises(ValueError, match="two machines: gpu NVIDIA H100, and NVIDIA H200; --across-machines"):
        compare(record(1), other)
    assert compare(record(1), other, across_machines=True).unchanged == 9
    newer = dataclasses.replace(record(2), machine=GPU | dict(versions={"torch": "2.13"}))
    assert compare(record(1), newer).notes == ["torch 2.11 -> 2.13"]


def real_op(seconds: float) -> Record:
    case = bench_rms_norm.cases(torch.device("cpu"), quick=True)[0]
    both = {name: peer for name, peer in case.implementations().items() if name in ("llama-fast", "PyTorch")}
    case = dataclasses.replace(case, peers=lambda: both)
    return Record(dict(processor="this one"), LIMITS, {}, case.measure(torch.device("cpu"), LIMITS, seconds=seconds))


def test_silent_on_a_real_op_measured_twice() -> None:
    """Other processes may be busy beside one of two runs and not beside the other: then another pair has to be silent."""
    pairs = (compare(real_op(0.3), real_op(0.3)) for _ in range(4))
    assert any(not found.is_regression and not found.faster for found in pairs)


def test_finds_a_slow_down_planted_in_a_real_op() -> None:
    """Pairs of rounds of one run against the pairs between them: other processes are busy alike in both, each implementation is
    as often the first of its round, and what differs is what is planted. With several processes a core the samples of one run may be
    too noisy to show 20 % (one run in five was): then another one has to."""

    def rounds(whole: Record, first: int, slowed: float) -> Record:
        results = []
        for result in whole.results:
            factor = slowed if result.implementation == "llama-fast" else 1.0
            samples = [factor * x for i, x in enumerate(result.samples) if i // 2 % 2 == first]
            results.append(dataclasses.replace(result, samples=samples))
        return dataclasses.replace(whole, results=results)

    found: set[str] = set()
    for _ in range(4):
        whole = real_op(1.5)
        assert not compare(rounds(whole, 0, 1.0), rounds(whole, 1, 1.0)).is_regression
        found = names(compare(rounds(whole, 0, 1.0), rounds(whole, 1, 1.2)))
        if found:
            break
    assert found == {"rms_norm llama-fast"}


def test_command(tmp_path: Path) -> None:
    files = []
    for seed, factor in ((1, 1.0), (2, 1.0), (3, 1.2)):
        files.append(str(tmp_path / f"{seed}.json"))
        write_json(
            files[-1], record(seed, factor=lambda op, name, by=factor: by if op + name == "linearllama-fast" else 1.0)
        )
    run = CliRunner()
    write_json(
        tmp_path / "noisy.json",
        record(4, samples=3, factor=lambda op, name: 0.5 if op == "linear" and name != "llama-fast" else 1),
    )
    noisy = run.invoke(app, ["bench", "compare", files[0], str(tmp_path / "noisy.json")])
    assert " are too noisy, or have too few samples, to show a change of 20%" in " ".join(noisy.output.split())
    assert "slower beside what ran with it, but not by the clock: 1" in noisy.output
    same = run.invoke(app, ["bench", "compare", files[0], files[1]])
    assert same.exit_code == 0, same.output
    assert "0 slower, 0 faster, 9 within the noise or 3%" in " ".join(same.output.split())
    slower = run.invoke(app, ["bench", "compare", files[0], files[2]])
    assert slower.exit_code == 1
    assert "slower: 1" in slower.output and "linear, 8192 x 4096, bfloat16, forward, llama-fast" in slower.output
    assert max(map(len, slower.output.splitlines())) <= 80
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for other, says in ((broken, "is no Record file"), (tmp_path / "none.json", "does not exist")):
        wrong = run.invoke(app, ["bench", "compare", files[0], str(other)])
        assert wrong.exit_code == 2 and says in wrong.output
