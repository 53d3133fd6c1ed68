"""`llama-fast profile` as a user meets it: what it asks of the profiler, what it writes, and what it says to wrong input."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.profiler.result import Profile
from llama_fast.reports.jsonfile import read_json, write_json
from tests.parity import not_interpreted
from tests.profiler.profiles import synthetic

pytestmark = not_interpreted

runner = CliRunner()


def invoke(*arguments, exit_code=0):
    result = runner.invoke(app, ["profile", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture
def asked(monkeypatch):
    """Stands in for the measuring, and keeps what it was asked."""
    found = {}

    def profile(model, *, trace, progress, **settings):
        found.update(settings, model=model)
        progress("measuring")
        trace.write_text('{"traceEvents": []}')
        return synthetic(model=model or "embedded model")

    monkeypatch.setitem(sys.modules, "llama_fast.profiler.run", SimpleNamespace(profile=profile))
    return found


@pytest.fixture
def never_measured(monkeypatch):
    def profile(*_, **__):
        raise AssertionError("wrong input must be refused before anything is measured")

    monkeypatch.setitem(sys.modules, "llama_fast.profiler.run", SimpleNamespace(profile=profile))


def test_options_reach_the_profiler_and_three_files_are_written(asked, tmp_path):
    out = tmp_path / "out"
    result = invoke(
        "some/model", "--prompt-tokens", "1k", "--new-tokens", 64, "--batch", "1, 8", "--context", "1k,8K,1000",
        "--against", "transformers, transformers-fused", "--device", "cpu", "--dtype", "bfloat16", "--rounds", 3, "--out", out,
    )  # fmt: skip
    assert asked == dict(
        model="some/model", prompt_tokens=1024, new_tokens=64, batch=[1, 8], contexts=[1024, 8192, 1000],
        against=["transformers", "transformers-fused"], device="cpu", dtype="bfloat16", rounds=3,
    )  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["profile.html", "profile.json", "trace.json"]
    assert read_json(out / "profile.json", Profile).model == "some/model"
    assert (out / "profile.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((out / "trace.json").read_text()) == {"traceEvents": []}
    assert "Where a token's" in result.stdout and "measuring" in result.stderr
    assert f"written to {out}" in result.stdout


def test_without_options_the_profiler_chooses_and_a_new_folder_is_named(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = invoke().stdout
    assert asked == dict(
        model=None, prompt_tokens=None, new_tokens=None, batch=[1], contexts=None, against=[], device="auto", dtype="auto",
        rounds=5,
    )  # fmt: skip
    name = re.search(r"written to (profile-embedded-\d+-\d+)", output)[1]
    assert (tmp_path / name / "profile.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "1q"], "--prompt-tokens: '1q' is no number"),
        (["--prompt-tokens", "1,2"], "--prompt-tokens takes one length, got 2"),
        (["--new-tokens", "0"], "--new-tokens: '0' is no number"),
        (["--batch", "-1"], "--batch: '-1' is no number"),
        (["--batch", ""], "--batch: '' is no number"),
        (["--context", "1k,,2k"], "--context: '' is no number"),
        (["--rounds", "0"], "--rounds"),
        (["--out", "/no/such/folder/out"], "--out: the folder /no/such/folder does not exist"),
        (["--out", __file__], "is a file, and must be a folder"),
        (["--nonsense"], "--nonsense"),
        (
            ["compare", "/no/such/a.json", "/no/such/b.json"],
            "/no/such/a.json does not exist. Give a file that `llama-fast profile`",
        ),
        (["compare", __file__, __file__], "is no Profile file of llama-fast"),
    ],
)
def test_wrong_input_is_named_before_anything_is_measured(never_measured, arguments, message):
    assert message in " ".join(invoke(*arguments, exit_code=2).output.split())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("prompt_tokens + new_tokens must be at most [512]"), 2, "must be at most [512]"),
        (ImportError("needs transformers"), 2, "needs transformers"),
    ],
)
def test_an_end_before_the_end_leaves_nothing(monkeypatch, tmp_path, error, code, message):
    def profile(*_, trace, **__):
        trace.write_text("half")
        raise error

    monkeypatch.setitem(sys.modules, "llama_fast.profiler.run", SimpleNamespace(profile=profile))
    result = invoke("--out", tmp_path / "out", exit_code=code)
    assert message in result.stderr and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_compare_says_what_changed_by_its_exit_status(tmp_path):
    slower = dict.fromkeys(("attention.qkv", "attention", "attention.out", "mlp.gate_up", "mlp.down", "head"), 1.2)
    for name, profile in (
        ("a", synthetic()), ("b", synthetic(seed=1, slower=slower)), ("c", synthetic(seed=2)), ("d", synthetic(machine="cpu")),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "profile.json", profile)
    assert "REGRESSION: ITL" in invoke("compare", tmp_path / "a", tmp_path / "b", exit_code=1).stdout
    assert "no regression" in invoke("compare", tmp_path / "a/profile.json", tmp_path / "c/profile.json").stdout
    assert "no regression" in invoke("compare", tmp_path / "a", tmp_path / "b", "--minimum", "0.3").stdout
    assert "--across-machines (across" in invoke("compare", tmp_path / "a", tmp_path / "d", exit_code=2).stderr
    invoke("compare", tmp_path / "d", tmp_path / "a", "--across-machines")


def test_the_embedded_model_is_profiled_for_real(tmp_path, capfd):
    """Nothing stands in for the measuring here."""
    out = tmp_path / "out"
    result = invoke(
        "--prompt-tokens", 48, "--new-tokens", 24, "--context", 32, "--rounds", 3, "--device", "cpu", "--out", out
    )  # fmt: skip
    profile = read_json(out / "profile.json", Profile)
    for waterfall in (profile.runs[0].token, profile.runs[0].first_token):
        assert sum(part.seconds for part in waterfall.parts) == pytest.approx(waterfall.measured, rel=1e-3)
    assert all(kernel.samples for kernel in profile.runs[0].kernels)
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    assert "Loading weights" not in result.output + capfd.readouterr().err  # a bar of transformers
    assert "embedded model" in (out / "profile.html").read_text(encoding="utf-8")
    assert "no regression" in invoke("compare", out, out).stdout
