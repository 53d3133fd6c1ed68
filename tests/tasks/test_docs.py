"""docs/use.md: its example prints what is shown, its commands run, and what it shows of a real model is what they gave."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.engine import EMBEDDED_MODEL
from tests.parity import not_interpreted
from tests.real_model import needs_real_model, real_model

pytestmark = not_interpreted

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "use.md").read_text()
TASKS = {"summaries": "summary", "questions": "answer", "translations": "french", "completions": "continuation"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def example() -> str:
    (found,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return found


def lines() -> list[str]:
    """Of all blocks without a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [line for language, block in blocks if not language for line in block.splitlines()]


def run(command: str, stdin: str | None = None) -> str:
    done = CliRunner().invoke(app, shlex.split(command)[1:], input=stdin)
    assert done.exit_code == 0, f"{command}\n{done.output}"
    return done.stdout


def test_the_example_prints_what_is_shown(capsys):
    exec(example(), {})
    (shown,) = re.findall(r"prints\n\n```\n(.*?)```", PAGE, re.DOTALL)
    assert capsys.readouterr().out == shown


def test_the_prompts_that_are_shown_are_the_embedded_models():
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert json.loads(shown) == json.loads((EMBEDDED_MODEL / "task_prompts.json").read_text())


def test_the_commands_of_the_embedded_model(here):
    story = re.findall(r"story = \(\n(.*?)\n\)", example(), re.DOTALL)[0]
    (here / "story.txt").write_text(eval(f"({story})"))
    asked, piped = [line for line in lines() if "llama-fast" in line and " embedded" in line]
    assert run(asked) == "Leo the parrot taught her.\n"
    command = piped.removeprefix("cat story.txt | ")
    assert run(command, (here / "story.txt").read_text()).startswith("Emma the monkey learned to draw")


@pytest.mark.parametrize(("task", "reference"), TASKS.items())
def test_there_are_twenty_texts_of_each_task(task, reference):
    rows = [json.loads(line) for line in (ROOT / "examples" / "tasks" / f"{task}.jsonl").read_text().splitlines()]
    assert len({json.dumps(row) for row in rows}) == 20 and all(row[reference] for row in rows)


def scores(text: str) -> list[tuple[str, list[float]]]:
    """The lines of a table of scores: a name; the value and its interval."""
    rows = re.findall(r"^ (\S.*?)  +([\d.]+)[ %]+([\d.]+)[ %–]+([\d.]+)", text, re.MULTILINE)
    return [(name, [float(figure) for figure in figures]) for name, *figures in rows]


@needs_real_model
@pytest.mark.nightly
def test_a_real_model_gives_what_is_shown(here):
    """In bfloat16, whose last bits are the machine's: most outputs are those, and the scores are in the intervals."""
    for line in lines():
        if re.match("llama-fast (summarize|answer|translate|complete) smollm2", line):
            run(line.replace("smollm2", str(real_model()), 1))
    found = scores("".join(run(line) for line in lines() if line.startswith("llama-fast eval score")))
    shown = scores("\n".join(lines()))
    assert [name for name, _ in found] == [name for name, _ in shown] and len(shown) == 10
    assert all(low <= value <= high for (_, (value, *_)), (_, (_, low, high)) in zip(found, shown, strict=True))
    told = re.findall(r"^\|.*\| (.*) \|$", PAGE.partition("## What a small model")[2], re.MULTILINE)
    told = [cell for cell in told if cell not in ("what it wrote", "---")]
    outputs = {
        " ".join(json.loads(row)["output"].split())
        for file in ("summaries", "answers", "translations", "completions")
        for row in (here / f"{file}.jsonl").read_text().splitlines()
    }
    assert len(told) >= 16 and sum(cell in outputs for cell in told) >= 0.7 * len(told)
