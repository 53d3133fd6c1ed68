"""docs/finetuning.md: its commands and programs run in their order, and say what is shown but for figures."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.config_file import read_config
from llama_fast.train import config
from llama_fast.train.config import TrainConfig
from tests.parity import not_interpreted
from tests.real_model import needs_real_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetuning.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
TABLES = dict(
    lora=config.LoraConfig, model=config.ModelConfig, data=config.DataConfig, run=config.RunConfig
)  # fmt: skip


def program(word):
    (found,) = (text for text in PROGRAMS if word in text)
    return found


def settings(out):
    (found,) = (text for kind, text in BLOCKS if kind == "toml" and f'out = "{out}"' in text)
    return found


def commands(word):
    """Each command of the blocks that name this, and what is shown under it."""
    shown = [text for kind, text in BLOCKS if not kind and text.startswith("$ ") and word in text]
    return [
        part.partition("\n")[::2]
        for text in shown
        for part in re.split(r"^\$ llama-fast ", text, flags=re.MULTILINE)[1:]
    ]


def run(command):
    result = CliRunner().invoke(app, [*shlex.split(command)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def letters(text):
    """The words of each line, without figures and the units that go with them."""
    lines = re.sub(r"\d (min|h|hours?|days?)\b", "", text).splitlines()  # a busy machine takes longer
    return [re.findall(r"(?<!\S)[a-z]{3,}(?![\w/])", line) for line in lines if line.strip()]


@pytest.mark.parametrize("table", TABLES)
def test_settings_that_are_named_are_there(table):
    (row,) = re.findall(rf"^\| `{table}` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    there = [field.name for field in fields(TABLES[table])]
    named = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row))
    assert set(named) <= set(there) and (table != "lora" or set(named) == set(there))


@not_interpreted
def test_the_first_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(program("NAMES = "), {})
    Path("greet.toml").write_text(settings("greeter"))
    (train, shown), generate, *export = commands("greet")
    said = run(f"{train} --threads 1")
    assert letters(said) == letters(shown)
    first, *_, last = (float(bits) for bits in re.findall(r"([\d.]+) bits per byte", said))
    assert first > 6 and last < 2.5
    assert run(generate[0]).startswith("Once upon a time")
    for command, text in export:
        assert run(command) == text
    for word in ("for model in (None,", "PeftModel"):
        exec(program(word), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("Good morning") for line in lines[2:]) and lines[3] == lines[4]


@not_interpreted
@pytest.mark.nightly
def test_what_trl_has_tuned_is_tuned_further(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(program("NAMES = "), {})
    exec(program("SFTTrainer"), {})
    text = settings("greeter").replace("rank = 32\nalpha = 32", 'path = "greeting-by-trl"')
    Path("greet.toml").write_text(text)
    bits = re.findall(r"([\d.]+) bits per byte", run("train greet.toml --threads 1 --set schedule.steps=40"))
    assert float(bits[0]) < 6 and float(bits[-1]) < float(bits[0])


@not_interpreted
@needs_real_model
@pytest.mark.nightly
def test_the_real_models_settings(tmp_path, monkeypatch):
    """Two steps of it."""
    monkeypatch.chdir(tmp_path)
    exec(program("shakespeare-pairs"), {})
    Path("folio.toml").write_text(settings("folio"))
    few = "--set schedule.steps=2 --set schedule.warm_up=0 --set run.validation_tokens=500"
    said = run(f"train folio.toml {few}")
    first, last, *_ = (float(bits) for bits in re.findall(r"([\d.]+) bits per byte", said))
    assert last < first
    assert read_config("folio.toml", TrainConfig).schedule.steps == 300
