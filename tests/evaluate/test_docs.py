"""docs/evaluation.md: its commands run, its examples print what is shown, and it describes the file that is written."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.evaluate import result
from tests.parity import not_interpreted
from tests.real_model import needs_real_model, real_model

pytestmark = not_interpreted

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evaluation.md"
CLASSES = [result.Evaluation, result.TaskResult, result.Score, result.Baseline, result.Example]


def blocks() -> list[tuple[list[str], str]]:
    """The commands of each block, and the output that the next block shows, if the page shows one."""
    found = re.findall(
        r"^```\n(llama-fast .*?)```\n(?:\n```\n((?!llama-fast).*?)```\n)?", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return [(commands.splitlines(), shown) for commands, shown in found]


def form(printed: str) -> list[str]:
    """What is left of a table without what depends on figures, the machine, and the number of examples."""
    lines = [
        line for line in printed.splitlines()
        if line.strip() and not re.search(r"^note:|^WORSE|^not worse|: \S+ on \S+$", line)
    ]  # fmt: skip
    plain = (re.sub(r"[-+]?\d[\d,.]*|–|─|better|worse|same", "", line) for line in lines)
    return [" ".join(line.split()) for line in plain]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(command: str, statuses: tuple[int, ...] = (0,)) -> str:
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code in statuses, f"{command}\n{done.output}"
    return done.stdout


def test_the_commands_print_what_is_shown(here):
    run_blocks([block for block in blocks() if "smollm2" not in "".join(block[0])], limit=" --limit 10")


@needs_real_model
@pytest.mark.nightly
def test_the_commands_on_a_real_model_print_what_is_shown(here):
    run_blocks([block for block in blocks() if "smollm2" in "".join(block[0])])


def run_blocks(some: list[tuple[list[str], str]], limit: str = "") -> None:
    assert some
    for commands, shown in some:
        for command in commands:
            compares = " compare " in command
            printed = run(
                command.replace("smollm2 ", f"{real_model()} ", 1) + ("" if compares else limit),
                (0, 1) if compares else (0,),
            )
        if shown:
            assert form(printed) == form(shown)


def test_the_examples_run(here, capsys):
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 2
    exec(examples[0], {})
    (shown,) = re.findall(r"prints\n\n```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert capsys.readouterr().out == shown
    exec(examples[1], {})
    assert capsys.readouterr().out.splitlines()[-1] == "30"


def test_the_task_that_is_shown_is_the_file():
    (shown,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert shown == (ROOT / "examples" / "evaluation" / "capitals.toml").read_text()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_described_and_no_other(kind):
    schema = PAGE.read_text().split("## evaluation.json")[1]
    (table,) = re.findall(rf"### {kind.__name__}\n\n\| field .*\n.*\n((?:\|.*\n)+)", schema)
    described = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(described) == sorted(field.name for field in fields(kind))
