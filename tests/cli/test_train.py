"""`llama-fast train` as a user meets it."""

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from tests.parity import not_interpreted
from tests.train.conftest import CONFIG
from tests.train.conftest import corpus as corpus

pytestmark = not_interpreted

runner = CliRunner()


def invoke(*arguments, exit_code=0):
    result = runner.invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def file(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.toml"
    path.write_text(CONFIG.format(root=corpus, out="run"))
    return path


def test_a_run_and_its_export(file):
    said = invoke(file, "--set", "schedule.steps=4", "--set", 'run.sample="Once"')
    assert "85,312 parameters; 4 steps of 384 tokens, 1,536 in all: 0.216 epochs" in said
    assert "step 2/4 loss " in said and "step 3: " in said and "'Once" in said
    assert "done after step 4, best " in said and "bits per byte at step 4" in said
    assert invoke("export", "run", "hf") == "step-00000004 written to hf"
    greedy = ["--max-tokens", "6", "--temperature", "0"]
    told = [runner.invoke(app, ["generate", model, "-p", "Once upon", *greedy]) for model in ("run", "hf")]
    assert told[0].stdout == told[1].stdout and told[0].stdout.startswith("Once upon")
    assert "step-00000004 of run" in told[0].stderr and "step-" not in told[1].stderr
    told = [runner.invoke(app, ["complete", model, "--max-tokens", "6"], input="Once upon") for model in ("run", "hf")]
    assert told[0].stdout == told[1].stdout != "" and "step-00000004 of run" in told[0].stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.toml"], "nothing.toml"),
        (["train.toml", "--set", "optimizer.kind=sgd"], "optimizer.kind must be one of adamw, muon, and is 'sgd'"),
        (["train.toml", "--set", "data.train=nowhere"], "nowhere has no shards"),
        (["export", "nowhere", "hf"], "nowhere has no checkpoint: give the folder of a run"),
    ],
)
def test_wrong_input_is_one_line(file, arguments, message):
    said = invoke(*arguments, exit_code=2)
    assert message in said and "Traceback" not in said
