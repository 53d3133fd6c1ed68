"""`llama-fast data` as a user meets it: its steps one by one, what it prints, and what it says to wrong input."""

import builtins
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from tests.data.run.corpora import CONFIG, paragraphs, write_corpus
from tests.parity import not_interpreted

pytestmark = not_interpreted

runner = CliRunner()


def invoke(*arguments, exit_code=0):
    result = runner.invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("texts"), paragraphs(30))
    Path("data.toml").write_text(CONFIG.replace("tasks = 3", "tasks = 1"))
    return tmp_path


def test_steps_one_by_one_and_a_report(here):
    assert "collect: read 30 – 30" in invoke("collect", "data.toml")
    invoke("clean", "data.toml")
    invoke("dedup", "data.toml")
    invoke("tokenizer", "data.toml", "--set", "tokenizer.vocab_size=500")
    said = invoke("tokenize", "data.toml", "--set", "tokenizer.vocab_size=500")
    assert "out/shards: " in said and "30 documents" in said and said.endswith("report: out/report.html")
    report = json.loads(Path("out/report.json").read_text())
    assert report["vocab_size"] == 500 and report["steps"][0]["documents_out"] == 30
    assert "| collect: read | 30 |" in Path("out/report.md").read_text()
    refused = invoke("run", "data.toml", exit_code=2)
    assert "tokenizer.vocab_size was 500 and is 600" in refused and "--redo tokenizer" in refused
    invoke("run", "data.toml", "--redo", "tokenizer")


def test_a_report_is_left_where_a_run_stops(here):
    with open("texts/part1.jsonl", "a") as file:
        file.write("no json\n" * 3)
    said = invoke("run", "data.toml", exit_code=2)
    assert "3 of 33 lines or files could not be read, more than --max-bad 1%" in said
    assert "texts/part1.jsonl:9" in Path("out/report.md").read_text()
    assert "could not be read: 3 lines or files" in invoke("collect", "data.toml", "--max-bad", "10%")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.toml"], "nothing.toml"),
        (["run", "data.toml", "--set", "dedup.ngrams=3"], "there is no dedup.ngrams; did you mean ngram?"),
        (["run", "data.toml", "--set", "sources.0.path=nowhere"], "source 'manual': there is nothing at nowhere"),
        (["run", "data.toml", "--max-bad", "lots"], "--max-bad: 'lots' is no share; write 1% or 0.01"),
        (["run", "data.toml", "--max-bad", "200%"], "is no share"),
        (["run", "data.toml", "--executor", "cloud"], "'cloud' is not one of"),
        (["run", "data.toml", "--executor", "slurm"], "slurm needs partition and time"),
        (["run", "data.toml", "--set", 'filters.languages=["xx"]'], "lingua"),
        (["run", "data.toml", "--set", "tokenizer.path=nowhere"], "nowhere"),
        (["clean", "data.toml"], "step collect is not complete in out"),
        (["collect"], "either a CONFIG or --source NAME"),
        (["collect", "data.toml", "--source", "pydoc"], "either a CONFIG or --source NAME"),
        (["collect", "--source", "nothing"], "no source is named 'nothing'; there are"),
    ],
)
def test_wrong_input_is_one_line(here, arguments, message):
    result = runner.invoke(app, ["data", *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output and not isinstance(result.exception, ValueError)


def test_text_by_name_is_fetched_into_the_cache(here, monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(here / "cache"))
    said = invoke("collect", "--source", "pydoc")
    assert said.startswith("pydoc: ") and str(here / "cache") in said.replace(" ", "")
    Path("data.toml").write_text('out = "out"\n[[sources]]\nname = "manual"\ncollection = "pydoc"\n')
    assert "collect: read" in invoke("collect", "data.toml")
    assert "pydoc/" in Path("out/state.json").read_text() and str(here) not in Path("out/state.json").read_text()


def test_a_missing_extra_is_one_line(here, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith(("llama_fast.data.run", "datatrove"))]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "datatrove":
            raise ModuleNotFoundError("No module named 'datatrove'", name="datatrove")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert 'datatrove is not installed: pip install "llama-fast[data]"' in invoke("run", "data.toml", exit_code=2)


def test_interrupted(here, monkeypatch):
    from llama_fast.data.run.pipeline import Run

    def interrupt(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_clean", interrupt)
    said = invoke("run", "data.toml", exit_code=130)
    assert "interrupted: what is complete is kept" in said
    monkeypatch.undo()
