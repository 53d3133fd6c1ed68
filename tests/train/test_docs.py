"""docs/training.md: its commands run as they stand there and say what is shown; docs/training-at-scale.md: its table is the ledger's."""

import os
import re
import shlex
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llama_fast.benchmarks.shapes import LLAMA_3_1_8B, ModelShape
from llama_fast.cli import train as cli
from llama_fast.cli.main import app
from llama_fast.config_file import read_config
from llama_fast.decoder.config import DecoderConfig
from llama_fast.reports.units import size
from llama_fast.train import config
from llama_fast.train.memory import training_memory
from llama_fast.train.metrics import NAMES
from tests.parity import not_interpreted

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
EXAMPLES = ROOT / "examples" / "shakespeare"
TABLES = {
    "data": config.DataConfig, "model": config.ModelConfig, "schedule": config.ScheduleConfig, "run": config.RunConfig,
    "batch": config.BatchConfig, "optimizer": config.OptimizerConfig, "loss": config.LossConfig,
    "ranks": config.RanksConfig, "lora": config.LoraConfig,
}  # fmt: skip
SHAPES = {
    "8B": LLAMA_3_1_8B,
    "70B": ModelShape("Llama-3.1-70B", 8192, 28672, 64, 8, 128, 80, 128256),
    "175B": ModelShape("175B", 12288, 32768, 96, 96, 128, 96, 50304),
}


def blocks(language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


@pytest.mark.parametrize("table", TABLES)
def test_every_setting_is_named_and_no_other(table):
    (row,) = re.findall(rf"^\| `{table}` \| (.*) \|$", PAGE.read_text().split("## All settings")[1], re.MULTILINE)
    named = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row))
    assert named == [field.name for field in fields(TABLES[table])] and set(TABLES) == {
        field.name for field in fields(config.TrainConfig)
    }


def test_the_columns_are_named():
    (row,) = re.findall(r"^\| `metrics.csv` \| .*?: (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", row)) == NAMES


def test_the_config_shown_is_the_example():
    shown, there = (
        re.sub(r"#.*", "", text).strip() for text in (blocks("toml")[0], (EXAMPLES / "small.toml").read_text())
    )
    assert shown == there


def test_the_examples_are_valid_and_one_has_ten_million_parameters():
    for name in ("small.toml", "train.toml"):
        made = read_config(EXAMPLES / name, config.TrainConfig)
        assert made.data.train == Path("runs/shakespeare/data/shards")
    assert made.model.hidden_size is not None
    parameters = 4096 * 320 + 7 * (4 * 320 * 320 + 3 * 320 * 864 + 2 * 320) + 320
    assert 9.9e6 < parameters < 10.1e6 and made.model.num_layers == 7 and made.model.intermediate_size == 864


def shape_of(text):
    """What of a text does not depend on the machine or on what was learnt: words, without figures and samples."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r"'.*'", "SAMPLE", line)
        line = re.sub(r"[\w. ]+ left$", " N left", line).replace(", the best", "")
        line = re.sub(r"^at least [^:]+:", "at least N:", re.sub(r"\d[\d.,e+-]*|\bnan\b", "N", line))
        lines.append(" ".join(re.sub(r"\bN ([kMGT]?)(FLOP(/s)?|B)\b", "N UNIT", line).split()))
    return lines


@not_interpreted
def test_commands_print_what_is_shown(corpus, tmp_path, monkeypatch, capsys):
    """On a smaller text, by a smaller model: the commands are the same."""
    monkeypatch.chdir(tmp_path)
    smaller = (EXAMPLES / "small.toml").read_text()
    for size_there, size_here in {
        "hidden_size = 128": "hidden_size = 96",
        "num_layers = 3": "num_layers = 1",
        "= 256": "= 32",
    }.items():
        assert size_there in smaller
        smaller = smaller.replace(size_there, size_here)
    examples = tmp_path / "examples" / "shakespeare"
    examples.mkdir(parents=True)
    (examples / "small.toml").write_text(smaller)
    data = tmp_path / "runs" / "shakespeare" / "data"
    data.mkdir(parents=True)
    for there, name in (("train", "shards"), ("validation", "shards_held_out"), ("bpe", "tokenizer")):
        (data / name).symlink_to(corpus / there)
    show = cli._show

    def interrupting(line):
        show(line)
        if line.startswith("step 100/"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cli, "_show", interrupting)
    shown = [block.partition("\n") for block in blocks() if block.startswith("$ llama-fast")]
    assert len(shown) == 5
    for command, _, text in shown:
        result = CliRunner().invoke(app, shlex.split(command)[2:], env={"COLUMNS": "300"})
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if text:
            assert shape_of(result.output) == shape_of(text), command
    assert (tmp_path / "runs/shakespeare/small/report.html").exists()
    capsys.readouterr()
    exec(blocks("python")[0], {})
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs


def test_the_table_on_paper_is_the_ledgers():
    text = (ROOT / "docs" / "training-at-scale.md").read_text()
    rows = re.findall(r"^\| (\w+B) \| (\d+) x (\d+) \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 9 and {row[0] for row in rows} == set(SHAPES)
    for name, dp, tp, recompute, figures in rows:
        memory = training_memory(
            DecoderConfig.from_huggingface(SHAPES[name].config()), tokens=8192, dtype=torch.bfloat16,
            recompute=recompute, dp=int(dp), tp=int(tp),
        )  # fmt: skip
        parts = (memory.weights, memory.gradients, memory.states, memory.gathered, memory.activations, memory.total)
        assert figures.split(" | ") == [size(part) if part else "–" for part in parts]
