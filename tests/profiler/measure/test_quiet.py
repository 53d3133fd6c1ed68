"""What other work takes from a measurement is seen, repeated, and said: by an invented /proc."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import llama_fast
from llama_fast.profiler.attribute.on_cpu import Operators
from llama_fast.profiler.compare import compare
from llama_fast.profiler.measure import quiet
from llama_fast.profiler.measure.latency import run_rounds
from llama_fast.profiler.measure.quiet import Patience, waited_seconds
from llama_fast.profiler.measure.sides import Generation
from llama_fast.profiler.report import view
from llama_fast.profiler.result import Profile
from llama_fast.reports.jsonfile import read_json, write_json
from tests.parity import not_interpreted
from tests.profiler.profiles import CPU_LIMITS, synthetic

pytestmark = not_interpreted

FEW = dict(device="cpu", dtype="float32", prompt_tokens=12, new_tokens=6, rounds=2, contexts=(), ablate=False)


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A clock of its own, and a process of two threads: call it with seconds to go by, and the share of them that the process waits."""
    waited, now, threads = {"7": 1_000_000_000, "8": 0}, [100.0], tmp_path / "self" / "task"

    def run(seconds: float, share: float) -> None:
        now[0] += seconds
        waited["8"] += round(1e9 * share * seconds)
        for thread, nanoseconds in waited.items():
            (threads / thread).mkdir(parents=True, exist_ok=True)
            (threads / thread / "schedstat").write_text(f"123456 {nanoseconds} 99\n")

    run(0, 0)
    monkeypatch.setattr(quiet, "_PROC", tmp_path)
    monkeypatch.setattr(quiet, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda pause: run(pause, 1)))
    return run


@pytest.fixture
def measured_machine(monkeypatch):
    """Its limits need not be measured again."""
    monkeypatch.setattr("llama_fast.profiler.run.measure_limits", lambda *_, **__: CPU_LIMITS)
    monkeypatch.setattr(quiet, "_PAUSE", 0)


def waiting(shares, proc):
    """What takes 20 ms, and in its i-th try waits for so much of that."""
    left = iter(shares)

    def measure():
        share = next(left)
        proc(0.02, share)
        return share

    return measure


def test_all_threads_count_and_one_that_ended_is_no_error(proc, tmp_path):
    proc(1, 0.5)
    assert waited_seconds() == pytest.approx(1.5)
    threads = tmp_path / "self" / "task"
    (threads / "9").mkdir()  # its file went while the folder was read
    (threads / "10").mkdir()
    (threads / "10" / "schedstat").write_text("")
    assert waited_seconds() == pytest.approx(1.5)


def test_of_another_process_its_own_threads_count(proc, tmp_path):
    """It waits for half of the time, and this one for none."""
    other = tmp_path / "123" / "task" / "123" / "schedstat"
    other.parent.mkdir(parents=True)
    other.write_text("1 0 1")

    def measure():
        proc(1, 0)
        other.write_text("1 500000000 1")

    assert Patience(0, 123).undisturbed(measure)[1] == pytest.approx(0.5)
    assert Patience(0).undisturbed(lambda: proc(1, 0))[1] == 0.0


def test_where_the_system_does_not_tell_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "_PROC", tmp_path / "none")
    tries = []
    assert waited_seconds() is None
    assert Patience(5).undisturbed(lambda: tries.append(1)) == (None, None) and len(tries) == 1
    assert not quiet.is_busy(None) and quiet.mean_share([None, None]) is None and quiet.mean_share([None, 0.5]) == 0.5


def test_what_is_quiet_is_measured_once(proc):
    result, share = Patience(5).undisturbed(waiting([0.01], proc))
    assert result == 0.01 and share == pytest.approx(0.01)


def test_it_is_repeated_until_it_is_quiet_and_the_least_disturbed_try_counts(proc):
    patience = Patience(5)
    assert patience.undisturbed(waiting([0.5, 0.3, 0.02], proc))[0] == 0.02
    result, share = patience.undisturbed(waiting([0.5, 0.2, 0.9, 0.6], proc))  # three repeats were left
    assert result == 0.2 and share == pytest.approx(0.2)
    assert patience.undisturbed(waiting([0.8], proc))[0] == 0.8  # and none is now


def test_the_share_is_no_more_than_all_of_the_time(proc):
    assert Patience(0).undisturbed(waiting([3.0], proc))[1] == 1.0


@pytest.mark.parametrize(("waits", "rounds"), [([0.0] * 3, 3), ([0.5, 0.0, 0.0, 0.0], 4), ([0.5] * 6, 6)])
def test_a_disturbed_round_is_repeated_and_no_more_often_than_there_are_rounds(proc, waits, rounds):
    calls = []

    def generate(prompts, new_tokens, **_):
        calls.append(1)
        if len(calls) > 2:  # after the warm-up
            proc(0.02, waits[len(calls) - 3])
        return Generation(0.0, [0.01, 0.02], [[1, 2]])

    side = SimpleNamespace(name="it", generate=generate, watch=lambda _: None)
    (found,) = run_rounds([side], torch.zeros(1, 3), None, 2, 3, on_failure=lambda *_: None)
    assert len(calls) - 2 == rounds and len(found.generations) == len(found.phases) == len(found.waited) == 3
    assert [share > quiet.MOST_WAITING for share in found.waited] == [waits[0] == 0.5 and rounds == 6] * 3


@pytest.mark.parametrize("busy", [False, True])
def test_a_profile_says_whether_its_parts_can_be_believed(measured_machine, monkeypatch, tmp_path, busy):
    """The clock of waiting runs as fast as the clock itself, or stands still."""
    monkeypatch.setattr(quiet, "waited_seconds", lambda _: time.perf_counter() if busy else 4.0)
    profile = llama_fast.profile(**FEW)
    write_json(tmp_path / "profile.json", profile)
    read = read_json(tmp_path / "profile.json", Profile)
    assert read.runs[0].waited == pytest.approx(1.0 if busy else 0.0, abs=0.2)
    assert view.is_disturbed(read) == busy
    assert any("their parts are not to be believed" in text for text in read.trust.warnings) == busy


def test_operators_that_were_timed_beside_other_work_are_not_believed_either(measured_machine, monkeypatch):
    """The rounds were quiet, and what explains them was not."""
    monkeypatch.setattr(quiet, "waited_seconds", lambda _: 4.0)
    time_operators = Operators.time

    def disturbed(self):
        with monkeypatch.context() as busy:
            busy.setattr(quiet, "waited_seconds", lambda _: time.perf_counter())
            time_operators(self)

    monkeypatch.setattr(Operators, "time", disturbed)
    profile = llama_fast.profile(**FEW)
    assert profile.runs[0].waited == pytest.approx(1.0, abs=0.2) and view.is_disturbed(profile)


def test_a_comparison_names_the_profile_that_was_disturbed():
    busy = synthetic(seed=1)
    busy = replace(busy, runs=[replace(run, waited=0.3) for run in busy.runs])
    for pair, which in (((synthetic(), busy), "second"), ((busy, synthetic()), "first")):
        notes = [note for note in compare(*pair).notes if "too busy" in note]
        assert notes == [f"the machine was too busy during the {which} profile: its figures are not to be believed"]


def test_a_profile_from_before_this_was_known_is_read(tmp_path):
    path = tmp_path / "profile.json"
    write_json(path, synthetic())
    path.write_text(path.read_text().replace(',"waited":null', ""))
    assert '"waited"' not in path.read_text()
    read = read_json(path, Profile)
    assert read.runs[0].waited is None and not view.is_disturbed(read)
    path.write_text(path.read_text().replace('"kernels":', '"gone":'))
    with pytest.raises(ValueError, match="kernels"):  # what has no default is still asked for
        read_json(path, Profile)
