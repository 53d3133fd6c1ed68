"""`llama-fast bench`: what it prints, keeps and refuses."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from llama_fast.benchmarks.report import tables
from llama_fast.benchmarks.suite import run
from llama_fast.benchmarks.suite.record import Record
from llama_fast.cli.main import app
from llama_fast.reports.jsonfile import read_json
from tests.benchmarks.fakes import LIMITS, FakeCase
from tests.checkpoints import DREAM, needs_dream


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[FakeCase]:
    """What there is to measure, on a machine whose limits are known."""
    found: list[FakeCase] = [FakeCase(), FakeCase(op="softmax", read=1 << 10)]
    monkeypatch.setattr(run, "find_cases", lambda *_, **__: found)
    monkeypatch.setattr(run, "measure_limits", lambda *_, **__: LIMITS)
    return found


def test_a_table_for_each_piece_of_work(cases: list[FakeCase], tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    done = bench("--quick", "--device", "cpu", "--json", str(file))
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {
        line.split()[0]: line.split() for line in lines if line.startswith((" llama-fast", "llama-fast", "PyTorch"))
    }
    # the last table is softmax's, whose bytes a cache of 1 MiB holds
    assert rows["llama-fast"] == [
        "llama-fast",
        "1.01",
        "1.00-1.02",
        "0.00",
        "in",
        "cache",
        "2.00",
        "1.0e-07",
        "3.0e-07",
    ]
    first = next(line.split() for line in lines if line.lstrip().startswith("llama-fast"))
    assert first == ["llama-fast", "1.01", "1.00-1.02", "2.08", "10%", "2.00", "1.0e-07", "3.0e-07"]
    wrong = next(line.split() for line in lines if line.lstrip().startswith("wrong "))
    assert wrong == ["wrong", "FAIL", "5.0e-01", "3.0e-07"], "no speed for what failed"
    assert "wrong: FAIL: error 5.0e-01 exceeds 3.0e-07" in done.output
    assert "PyTorch: takes 2 GiB" in done.output
    assert done.output.count("not measured: Liger: not installed (rms_norm, softmax)") == 1
    record = read_json(file, Record)
    assert [len(record.results), record.limits, record.settings["quick"]] == [6, LIMITS, True]


def test_the_report_is_a_page_for_a_browser_and_one_in_markdown(cases: list[FakeCase], tmp_path: Path) -> None:
    done = bench("--quick", "--device", "cpu", "--report", str(tmp_path / "out"))
    html, markdown = (tmp_path / "out" / f"performance.{kind}" for kind in ("html", "md"))
    assert done.exit_code == 0 and f"report written to {html} and {markdown}" in done.output
    assert "FAIL: error 5.0e-01 exceeds 3.0e-07" in html.read_text(encoding="utf-8")
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_real_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the way, but for the peers that compile."""
    from llama_fast.benchmarks import peers

    monkeypatch.setattr(run, "measure_limits", lambda *_, **__: LIMITS)
    monkeypatch.setattr(peers, "compiled", lambda *_, **__: {})
    done = bench("kernels", "--ops", "rms_norm", "--quick", "--device", "cpu", "--json", str(tmp_path / "a.json"))
    assert done.exit_code == 0, done.output
    results = read_json(tmp_path / "a.json", Record).results
    assert {result.op for result in results} == {"rms_norm"} and all(result.samples for result in results)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (run.GpuFailure("the GPU is gone"), 1)])
def test_what_was_measured_is_kept(cases: list[FakeCase], tmp_path: Path, error: BaseException, status: int) -> None:
    def end() -> None:
        raise error

    cases.append(FakeCase(op="attention", before=end))
    file = tmp_path / "a.json"
    done = bench("--quick", "--device", "cpu", "--json", str(file))
    assert done.exit_code == status
    said = " ".join(done.output.split())
    assert f"what was measured until then is above and in {file}" in said
    record = read_json(file, Record)
    assert {result.op for result in record.results} == {"rms_norm", "softmax"}
    assert record.warnings == [f"ended early: {str(error) or 'interrupted'}"]


def test_a_case_that_cannot_be_done_is_a_failure_of_each(cases: list[FakeCase]) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("no 80 GiB here")

    cases[:] = [FakeCase(before=too_large)]
    done = bench("--quick", "--device", "cpu")
    assert done.output.count("FAIL: OutOfMemoryError: no 80 GiB here") == 3
    assert done.exit_code == 1 and "results of llama-fast that failed: 1" in done.output


def test_wrong_arguments_are_named_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "new_record", lambda *_, **__: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    for arguments, says in (
        (["kernels", "--ops", "nothing"], "there is no benchmark of 'nothing' in kernels; choose from attention,"),
        (["--json", str(tmp_path / "none" / "a.json")], f"--json: the folder {tmp_path / 'none'} does not exist"),
        (["--json", str(tmp_path)], "is a folder"),
        (["--report", str(tmp_path / "file")], "is a file, and must be a folder"),
        (["--ops", ""], "there is no benchmark of ''"),
        (["--device", "tpu"], "choose auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "use --device cpu"),
    ):
        wrong = bench(*arguments)
        assert wrong.exit_code == 2 and says in wrong.output, wrong.output
    assert bench("nonsense").exit_code == 2


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_a_folder_without_permission_is_named_before(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "new_record", lambda *_, **__: pytest.fail("it measured"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # nothing is forbidden to root
    wrong = bench("--quick", option, str(tmp_path / "a"))
    assert wrong.exit_code == 2 and f"{option}: no permission to write to {tmp_path}" in wrong.output


@pytest.mark.parametrize("missing", ["pytest", "matplotlib"])
def test_without_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    done = bench("--quick", "--report", str(tmp_path))
    assert done.exit_code == 2
    assert f'bench needs {missing}, which is not installed: pip install "llama-fast[bench]"' in done.output


def test_what_fails_after_the_gpu_is_lost_is_not_blamed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(run, "gpu_state", lambda _: {})
    record = Record({}, LIMITS, {})
    with pytest.raises(
        run.GpuFailure, match=r"answers nothing more: CUDA error: an illegal memory access was encountered$"
    ):
        run.run_cases(record, [FakeCase(), FakeCase(op="softmax")], torch.device("cuda"), seconds=0.1)
    assert [result.implementation for result in record.results] == ["llama-fast", "PyTorch", "wrong"]
    assert (record.results[2].failure or "").startswith("this implementation, or one before it, lost the GPU: FAIL")


@needs_dream
def test_a_model_of_the_users_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_limits", lambda *_, **__: LIMITS)
    file = tmp_path / "a.json"
    done = bench("generate", "--model", str(DREAM), "--quick", "--device", "cpu", "--json", str(file))
    assert done.exit_code == 0, done.output
    record = read_json(file, Record)
    assert {result.shape for result in record.results} == {"dream-260k, batch 1, 16 + 16 tokens"}
    assert record.settings["model"] == str(DREAM)
    assert all(result.samples and result.error is not None for result in record.results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "/no/such/model"], "--model: there is no folder /no/such/model"),
        (["generate", "--model", "no.gguf"], "--model: there is no file no.gguf"),
        (["--model", "smollm2"], "--model: `llama-fast bench generate --model smollm2` measures a model"),
        (["prefill", "--model", "smollm2"], "--model: `llama-fast bench generate --model smollm2` measures a model"),
    ],
)
def test_a_model_that_cannot_be_measured(arguments: list[str], message: str) -> None:
    done = bench("--quick", *arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_every_kind_and_op_has_cases() -> None:
    cpu = torch.device("cpu")
    for kind in run.KINDS:
        assert run.find_cases([kind], None, cpu, quick=True), kind
    assert {case.op for case in run.find_cases(run.KINDS, ["norm_swiglu"], cpu, quick=True)} == {"norm_swiglu"}


def test_warnings_of_a_gpu() -> None:
    """Noise row by row, clocks that moved, and no more of either than a screen holds."""
    case = FakeCase()
    old, new = (
        {"clocks.sm": f"{clock} MHz", "clocks_throttle_reasons.active": why}
        for clock, why in ((1980, "0x0000000000000001"), (1700, "0x0000000000000004"))
    )
    assert run._clock_warnings(case, old, old) == []
    assert run._clock_warnings(case, old, new) == [
        "rms_norm, 8192 x 4096, float32, forward: the SM clock went from 1980 to 1700 MHz",
        "rms_norm, 8192 x 4096, float32, forward: the GPU held its clock back, reasons 0x0000000000000004",
    ]
    assert run._clock_warnings(case, {}, {"clocks.sm": "[N/A]"}) == []
    settings: dict[str, Any] = {}
    record = Record(dict(gpu="NVIDIA H100"), LIMITS, settings, warnings=["a warning"] * 20)
    noisy = case.measure(torch.device("cpu"), LIMITS, seconds=0)[0]
    object.__setattr__(noisy, "samples", [1e-3, 2e-3] * 10)
    record.results = [noisy]
    console = Console(width=80, record=True, file=io.StringIO())
    tables.print_record(record, console)
    text = " ".join(console.export_text().split())
    assert text.count("a warning") == 8 and "and 12 more" in text
    assert "llama-fast: p20 to p80 are 66.7% of the median" in text
