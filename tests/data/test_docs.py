"""docs/data.md: its commands and its example run as they stand there, and it names every setting."""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.data import config
from tests.parity import not_interpreted

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
TABLES = {
    "top": config.Config, "`sources`": config.Source, "`clean`": config.Clean, "`filters`": config.Filters,
    "`filters.gopher_quality`": config.GopherQuality, "`filters.gopher_repetition`": config.GopherRepetition,
    "`decontaminate`": config.Decontaminate, "`dedup`": config.Dedup, "`tokenizer`": config.Tokenizer,
    "`mixture`": config.Mixture, "`executor`": config.Executor,
}  # fmt: skip


def blocks(language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


def words(text):
    return [line.split() for line in text.splitlines() if line.strip() and "─" not in line]


@pytest.mark.parametrize("table", TABLES)
def test_every_setting_is_named_and_no_other(table):
    (row,) = re.findall(
        rf"^\| {re.escape(table)} \| (.*) \|$", PAGE.read_text().split("## All settings")[1], re.MULTILINE
    )
    named = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row))
    assert named == [field.name for field in fields(TABLES[table])]


def test_every_table_of_the_page_is_read(tmp_path):
    from llama_fast.config_file import read_config

    first, *others = blocks("toml")
    for other in others:
        (tmp_path / "c.toml").write_text(first + other)
        read_config(tmp_path / "c.toml", config.Config)


@not_interpreted
def test_commands_print_what_is_shown_and_the_example_runs(tmp_path, monkeypatch, capsys):
    """Figures are those of one Python's manual: with another, words are compared and numbers are not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    Path("manual.toml").write_text(blocks("toml")[0])
    exact = sys.version_info[:2] == (3, 11)
    shown = [block.partition("\n") for block in blocks() if block.startswith("$ llama-fast")]
    assert len(shown) == 3
    for command, _, text in shown:
        said = CliRunner().invoke(app, shlex.split(command)[2:], env={"COLUMNS": "100"}).output
        lines = [line for line in words(said.replace(f"{tmp_path}/", "")) if "─" not in line[0]]
        printed = [line for line in lines if not re.fullmatch(r"[a-z]+(: [a-z ]+)?", " ".join(line))]  # progress
        assert len(printed) == len(words(text))
        for ours, theirs in zip(printed, words(text), strict=True):
            assert ours == theirs if exact else ours[:2] == theirs[:2]
    (expected,) = re.findall(r"prints\n\n```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(blocks("python")[0], {})
    output = capsys.readouterr().out
    assert output == expected if exact else output.count("\n") == expected.count("\n")
    (shown_report,) = (block for block in blocks() if block.startswith("## Removed"))
    if exact:
        assert shown_report.strip() in Path("manual/report.md").read_text()
