"""The campaign: what a call does, what the next one goes on with, and what a part that dies leaves to the others."""

import dataclasses
import json
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from llama_fast.benchmarks.engines.cases import EngineCase, Session
from llama_fast.benchmarks.report.headlines import headlines
from llama_fast.benchmarks.suite import campaign, pytest_groups, run
from llama_fast.benchmarks.suite.campaign import Part, is_complete, run_campaign, run_part
from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.benchmarks.suite.sweep import Sweep
from llama_fast.cli.main import app
from llama_fast.reports.jsonfile import read_json, write_json
from tests.benchmarks.fakes import LIMITS, FakeCase

CPU = torch.device("cpu")


class Died(BaseException):
    """The end of a process, as far as a test in the same process can see it."""


def with_cases(monkeypatch: pytest.MonkeyPatch, cases: list[FakeCase]) -> Callable[[Path, float], bool]:
    """Runs the part "rms_norm", which has these cases."""
    monkeypatch.setattr(run, "kernel_cases", lambda name, device, quick: cases)
    monkeypatch.setattr(campaign, "measure_limits", lambda *_, **__: LIMITS)

    def go(folder: Path, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        return run_part("rms_norm", folder, CPU, quick=True, deadline=deadline, progress=lambda *_: None)

    return go


def test_a_part_stops_at_its_deadline_and_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def case(shape: str) -> FakeCase:
        def before() -> None:
            measured.append(shape)
            time.sleep(0.2)

        return FakeCase(shape=shape, before=before)

    go = with_cases(monkeypatch, [case("1"), case("2"), case("3")])
    assert not go(tmp_path, 0.3), "after one case of 0.2 s there is no time for another"
    assert measured == ["1"] and not is_complete(tmp_path / "rms_norm.json")
    assert [row[1] for row in headlines(tmp_path, [Part("rms_norm", 1), Part("softmax", 1)])] == ["begun", "to do"]
    assert go(tmp_path, 10)
    assert measured == ["1", "2", "3"] and is_complete(tmp_path / "rms_norm.json")
    record = read_json(tmp_path / "rms_norm.json", Record)
    assert [result.shape for result in record.results] == ["1"] * 3 + ["2"] * 3 + ["3"] * 3
    assert headlines(tmp_path, [Part("rms_norm", 1)]) == [("rms_norm", "done", "3 works, 2.00x PyTorch, 10% of limit")]


def test_a_case_that_ends_its_process_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise Died

    go = with_cases(monkeypatch, [FakeCase(shape="1"), FakeCase(shape="2", before=die), FakeCase(shape="3")])
    for _ in range(campaign.MOST_ATTEMPTS):
        with pytest.raises(Died):
            go(tmp_path, 10)
    assert go(tmp_path, 10)
    results = read_json(tmp_path / "rms_norm.json", Record).results
    assert [bool(each.samples) for each in results if each.implementation == "llama-fast"] == [True, False, True]
    assert "its process ended 2 times" in next(each.failure or "" for each in results if each.shape == "2")


def test_a_case_is_not_to_blame_for_the_end_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise Died

    go = with_cases(monkeypatch, [FakeCase(shape="1", before=die)])
    file = tmp_path / "rms_norm.json"
    for expected in (1, 1):
        with pytest.raises(Died):
            go(tmp_path, 10)
        assert list(read_json(file, Record).settings["attempts"].values()) == [expected]
        campaign._forgive(file)
    assert read_json(file, Record).settings["attempts"] == {}
    campaign._forgive(file)  # nothing was begun
    write_json(tmp_path / "sweep.json", Sweep({}, "sm_90", 132, running="linear"))
    campaign._forgive(tmp_path / "sweep.json")
    assert read_json(tmp_path / "sweep.json", Sweep).running is None


def test_the_latencies_of_a_generation_are_not_torn_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured as one: a process that ends between them has it all to do again."""
    cases = [
        FakeCase(shape=shape, direction=direction, before=lambda: time.sleep(0.2))
        for shape in ("8B", "1B") for direction in ("time to first token", "inter-token latency")
    ]  # fmt: skip
    assert not with_cases(monkeypatch, cases)(tmp_path, 0.3)
    results = read_json(tmp_path / "rms_norm.json", Record).results
    assert [(each.shape, each.direction) for each in results[::3]] == [
        (case.shape, case.direction) for case in cases[:2]
    ]


def test_what_engines_share_a_process_for_is_not_torn_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is measured as one, at its first case."""
    begun: list[Session] = []

    def measure(case: EngineCase, *_: object, **__: object) -> list[Result]:
        if case.session not in begun:
            begun.append(case.session)
        return [Result(*run.work_key(case), "llama-fast", samples=[1.0])]

    monkeypatch.setattr(EngineCase, "measure", measure)
    monkeypatch.setattr(campaign, "measure_limits", lambda *_, **__: LIMITS)
    monkeypatch.setattr(
        campaign, "time", SimpleNamespace(monotonic=lambda: 10.0 * len(begun))
    )  # each takes ten seconds

    def go(deadline: float) -> bool:
        return run_part("engines", tmp_path, CPU, quick=False, deadline=deadline, progress=lambda *_: None)

    assert not go(15.0) and len(begun) == 1
    results = read_json(tmp_path / "engines.json", Record).results
    assert len(results) == len(begun[0].settings()) == 3
    assert go(1000.0) and len(begun) == len(set(begun)) >= 5


def test_another_machine_or_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = with_cases(monkeypatch, [FakeCase(shape="1")])
    assert go(tmp_path, 10)
    campaign.require_same(tmp_path, CPU, quick=True)
    run_it = ["bench", "campaign", "--out", str(tmp_path), "--device", "cpu", "--part", "rms_norm"]
    wrong = CliRunner().invoke(app, run_it)
    assert wrong.exit_code == 2 and "rms_norm.json was measured with --quick; give another folder" in wrong.output
    record = read_json(tmp_path / "rms_norm.json", Record)
    record.settings["complete"], record.machine["commit"], record.results[:] = False, "0123", []
    write_json(tmp_path / "rms_norm.json", record)
    assert go(tmp_path, 10)
    assert read_json(tmp_path / "rms_norm.json", Record).warnings[0].startswith("some of these results are of commit ")
    monkeypatch.setattr(campaign, "machine", lambda _: {"gpu": "NVIDIA H200"})
    with pytest.raises(ValueError, match=r"rms_norm\.json was measured on cpu-.*, and this is nvidia-h200"):
        campaign.require_same(tmp_path, CPU, quick=True)


def test_an_interrupted_campaign_is_told_by_its_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "run_campaign", interrupted)
    done = CliRunner().invoke(app, ["bench", "campaign", "--out", str(tmp_path), "--device", "cpu"])
    assert done.exit_code == 130 and "interrupted: the same command goes on from here" in done.output
    assert (tmp_path / "campaign.zip").exists()


def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In Python's place: "good" writes its part, "steps" needs two calls, "crash" and "hang" do what they say."""
    file = tmp_path / "python"
    file.write_text(
        """#!/bin/bash
while [ $# -gt 0 ]; do
  case $1 in --part) part=$2;; --out) out=$2;; esac; shift
done
echo "this is $part"
case $part in
  good) sleep 60 & echo $! > $out/child; echo '{"complete": true}' > $out/good.json;;
  steps) if [ -e $out/steps.json ]; then echo '{"complete": true}' > $out/steps.json
         else echo '{"complete": false}' > $out/steps.json; exit 1; fi;;
  crash) kill -SEGV $$;;
  hang) sleep 60;;
  late) echo '{"complete": false, "at": '$RANDOM'}' > $out/late.json; exit 3;;
esac
"""
    )
    file.chmod(0o755)
    monkeypatch.setattr(campaign.sys, "executable", str(file))
    monkeypatch.setattr(campaign, "_LEAST_SECONDS", 0.1)
    monkeypatch.setattr(campaign, "_GRACE_SECONDS", 0.1)
    return file


def test_one_part_that_dies_or_hangs_loses_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, monkeypatch)
    out, told = tmp_path / "out", []
    out.mkdir()
    start = time.monotonic()
    parts = [Part("crash", 1), Part("hang", 1), Part("good", 1), Part("steps", 1)]
    run_campaign(out, parts, device="cpu", minutes=5 / 60, quick=True, tell=told.append)
    assert time.monotonic() - start < 6.5
    states = {name: is_complete(out / f"{name}.json") for name in ("crash", "hang", "good", "steps")}
    assert states == {"crash": False, "hang": False, "good": True, "steps": True}
    assert "crash: ended with status -11: this is crash" in told and "hang: out of time" in told
    child = subprocess.run(["ps", "-o", "stat=", "-p", (out / "child").read_text()], capture_output=True, text=True)
    assert child.stdout.strip()[:1] in ("", "Z"), "what a part starts ends with it"
    with zipfile.ZipFile(out / "campaign.zip") as archive:
        assert sorted(archive.namelist()) == ["child", "good.json", "log.txt", "steps.json"]
        assert b"== crash\nthis is crash" in archive.read("log.txt")

    told.clear()
    run_campaign(out, parts[2:], device="cpu", minutes=5 / 60, quick=True, tell=told.append)
    assert told == [], "what is complete is not begun again"


def test_a_part_that_had_all_the_time_is_not_begun_for_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next case does not fit, and its process would only find that out."""
    script(tmp_path, monkeypatch)
    out, told = tmp_path / "out", []
    out.mkdir()
    run_campaign(out, [Part("late", 60)], device="cpu", minutes=3 / 60, quick=True, tell=told.append)
    assert told == ["late: up to 3 s", "late: out of time"]
    told.clear()
    run_campaign(out, [Part("late", 1)], device="cpu", minutes=3 / 60, quick=True, tell=told.append)
    assert len(told) == 4, "a part that had its share alone may have what is left"


def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    """With real processes, of the part that a machine without a GPU is soonest done with."""
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["bench", "campaign", "--out", str(out), "--quick", "--device", "cpu", "--part", "sweep"]
    )
    assert done.exit_code == 0, done.output
    assert " sweep  done   there is no GPU to sweep plans on" in done.output, (out / "log.txt").read_text()
    assert (out / "campaign.zip").exists() and max(map(len, done.output.splitlines())) <= 80 + len(str(out))
    wrong = CliRunner().invoke(app, ["bench", "campaign", "--out", str(out), "--part", "nothing"])
    assert wrong.exit_code == 2 and "there is no 'nothing'; choose from limits, tests-gpu," in wrong.output


def test_parts_are_in_the_order_of_their_weight() -> None:
    """The lease may end after any of them."""
    names = [part.name for part in campaign.parts()]
    assert names[:6] == ["limits", "tests-gpu", "norm_swiglu", "norm_qkv_rope", "attention_decode", "generate"]
    assert names[6:9] == ["attention", "linear", "rms_norm"]
    assert names[-4:] == ["profile-1b", "profile-8b", "tests", "sweep"]
    assert {"layer", "prefill", "train", *(stem.removeprefix("bench_") for stem in run.kernel_files())} <= set(names)
    assert len(set(names)) == len(names)
    assert all((pytest_groups.ROOT / group[0]).exists() for groups in pytest_groups.GROUPS.values() for group in groups)


def test_the_tests_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tmp_path / "tests"
    suite.mkdir()
    (suite / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    (suite / "test_y.py").write_text("import no_such_package\n")
    monkeypatch.setattr(pytest_groups, "ROOT", tmp_path)
    monkeypatch.setattr(pytest_groups, "_WORKERS", 1)
    groups = (("tests/test_x.py", "tests/test_y.py"), ("tests/none",))
    runs, saved = pytest_groups.SuiteRuns({}), []

    def go(runs: pytest_groups.SuiteRuns, seconds: float) -> None:
        pytest_groups.run_tests(
            runs, groups, deadline=time.monotonic() + seconds, save=lambda: saved.append(1), progress=lambda *_: None
        )

    go(runs, 60)
    first, second = runs.runs
    assert "No module named 'no_such_package'" in first.failures.pop(0)
    first = dataclasses.replace(first, failed=first.failed - 1)
    assert (first.passed, first.failed, first.skipped) == (1, 1, 1) and "assert 1 == 2" in first.failures[0]
    assert second.failed == 1 and runs.complete and len(saved) == 3
    write_json(tmp_path / "tests.json", runs)
    assert headlines(tmp_path, [Part("tests", 1)])[0][2] == "1 passed, 3 failed"
    assert json.loads((tmp_path / "tests.json").read_text())["complete"]

    (suite / "test_x.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    (suite / "test_y.py").unlink()
    groups = (("tests/test_x.py",),)
    for seconds in (0.0, 1.5):
        late = pytest_groups.SuiteRuns({})
        go(late, seconds)
        assert not late.complete and not late.runs, "a group that had no time is left for the next call"
    monkeypatch.setattr(pytest_groups, "_LEAST_SECONDS", 0.1)
    go(late, 4)
    assert late.runs[0].passed == 1, "what had run by then is kept"
    assert late.runs[0].failures[-1].startswith("pytest did not end within")
