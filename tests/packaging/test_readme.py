"""What the README shows runs as it stands there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from llama_fast.benchmarks.suite.record import Record, Result
from llama_fast.cli.main import app
from llama_fast.engine import EMBEDDED_MODEL
from llama_fast.reports.jsonfile import read_json
from tests.parity import not_interpreted
from tests.real_model import needs_real_model, real_model

pytestmark = not_interpreted

README = Path(__file__).parents[2] / "README.md"
PAGES = [README, README.parent / "CONTRIBUTING.md", *sorted((README.parent / "docs").glob("*.md"))]


def run_example(page: Path, containing: str) -> dict:
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if containing in code
    )
    scope = {}
    exec(example, scope)
    return scope


def quick_start(checkpoint: Path, **options: str) -> str:
    """The README's snippet with another model. A .gguf file is named beside its folder."""
    (code,) = (each for each in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if ".fuse(" in each)
    code = re.sub(r'^checkpoint = ".*?"', lambda _: f"checkpoint = {str(checkpoint)!r}", code, flags=re.MULTILINE)
    named = "".join(f", {name}={value!r}" for name, value in options.items())
    return code.replace("from_pretrained(checkpoint", f"from_pretrained(checkpoint{named}")


def test_the_quick_start_runs_plain_and_fused(capsys):
    code = quick_start(EMBEDDED_MODEL)
    exec(code, scope := {})
    fused = capsys.readouterr().out
    assert scope["model"].config._attn_implementation != "eager" and "llama_fast.fuse, mode='inference'" in fused
    exec(code.replace("print(llama_fast.fuse(model))", ""), {})
    assert fused.endswith(plain := capsys.readouterr().out) and len(plain) > 10


@needs_real_model
def test_the_quick_start_says_what_is_shown(capsys):
    """Of SmolLM2, plain and fused."""
    path = real_model()
    code = quick_start(path.parent, gguf_file=path.name)
    (shown,) = re.findall(r"prints, after the report.*?```\n(.*?)```", README.read_text(), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.endswith(shown)
    exec(code.replace("print(llama_fast.fuse(model))", ""), {})
    assert capsys.readouterr().out == shown


def test_the_generate_example_runs(capsys):
    run_example(README, "llm.stream(")
    assert len(capsys.readouterr().out) > 100


def test_the_page_on_generating_shows_what_its_example_prints(capsys):
    page = README.parent / "docs" / "generation.md"
    run_example(page, "llm.stream(")
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"prints\n\n```\n(.*?)```", page.read_text(), re.DOTALL)
    # the last digits of a logarithm depend on the CPU
    assert printed.partition("TokenLogprob")[0] == shown.partition("TokenLogprob")[0]


@needs_real_model
def test_the_example_of_a_gguf_file_gives_what_is_shown(capsys, monkeypatch):
    monkeypatch.chdir(real_model().parent)
    page = README.parent / "docs" / "generation.md"
    run_example(page, "SmolLM2")
    (shown,) = re.findall(r"gives\n\n```\n(.*?)```", page.read_text(), re.DOTALL)
    assert capsys.readouterr().out == shown


def test_the_example_of_the_page_on_benchmarking_judges_and_times(capsys):
    run_example(README.parent / "docs" / "benchmarking.md", "OpCase(")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["llama-fast", "PyTorch", "by", "the"]
    assert all(re.search(r"\d us, error \d", line) for line in lines[:3])
    assert "FAIL: error" in lines[3] and " us" not in lines[3]


@pytest.mark.parametrize("page", ["README.md", "docs/generation.md"])
def test_the_figures_of_generation_are_those_of_the_result_files(page):
    """Of transformers as it is ("PyTorch" in the files) and our engine, on the CPU that the pages name."""
    (file,) = (README.parent / "benchmarks" / "results").glob("cpu-amd-*-avx-512-2-threads/generate.json")
    results = [result for result in read_json(file, Record).results if result.op == "generate"]
    rows = re.findall(
        r"^\| (float32|bfloat16), batch (\d) \| (.*) \|$", (README.parent / page).read_text(), re.MULTILINE
    )
    assert len(rows) == 4
    for dtype, batch, cells in rows:
        sides = {
            (result.implementation, result.direction): result
            for result in results if result.dtype == dtype and f"batch {batch}," in result.shape
        }  # fmt: skip
        both = ("PyTorch", "llama-fast")
        first = [1e3 * sides[side, "time to first token"].timing.median for side in both]
        inter = [1e3 * sides[side, "inter-token latency"].timing.median for side in both]
        errors = [sides[side, "inter-token latency"].error for side in both]
        speed = [1e3 * int(batch) / each for each in inter]
        told = [cell.split(" / ") for cell in cells.split(" | ")]
        for figures, texts, form in (
            (first, told[0], ".0f"), (inter, told[1], ".1f"), (speed, told[2], ".0f"), (errors, told[4], ".1e"),
        ):  # fmt: skip
            assert texts == [f"{figure:{form}}" for figure in figures], (dtype, batch)
        assert told[3] == [f"{inter[0] / inter[1]:.2f}x"]


ENGINES = ("llama-fast", "llama.cpp", "OpenVINO GenAI")


def beside_engines(machine: str) -> list[str]:
    """The rows of a machine's table of a token, a batch, a prompt and memory, by the result file."""
    (file,) = (README.parent / "benchmarks" / "results").glob(f"cpu-{machine}-*-avx-512-2-threads/engines.json")
    rows: dict[str, dict[str, list[Result]]] = {}
    for result in read_json(file, Record).results:
        model, what, tokens, threads = result.shape.split(", ")
        row = rows.setdefault(f"{model}{', a chat' * (what == 'chat')}, {result.dtype}, {threads}", {})
        row.setdefault("prompt" if tokens.endswith(" + 1 tokens") else what.replace("chat", "batch 1"), []).append(
            result
        )
    assert all(
        [each.implementation for each in work] == list(ENGINES) for row in rows.values() for work in row.values()
    )
    return [f"| {name} | {' | '.join(_cells(row))} |" for name, row in rows.items()]


def _cells(row: dict[str, list[Result]]) -> list[str]:
    def cell(work: list[Result] | None, told: Callable[[Result], str]) -> str:
        return "" if work is None else " / ".join(map(told, work))

    def memory(result: Result) -> str:
        return re.search(r", ([\d,]+) more than after imports", str(result.note))[1]

    ms = ".3f" if row["batch 1"][0].timing.median < 1e-3 else ".1f"
    return [
        cell(row["batch 1"], lambda result: f"{1e3 * result.timing.median:{ms}}"),
        cell(row["batch 1"], lambda result: f"{result.share_of_limit:.0%}"),
        cell(row.get("batch 8"), lambda result: f"{8 / result.timing.median:,.0f}"),
        cell(row.get("prompt"), lambda result: f"{1e3 * result.timing.median:.0f}"),
        cell(row["batch 1"], memory),
    ]


def test_the_figures_beside_other_engines_are_those_of_the_result_file():
    page = (README.parent / "docs" / "generation.md").read_text()
    told = re.findall(r"^\| \S+, (?:a chat, )?(?:float32|bfloat16), \d threads? \|.*$", page, re.MULTILINE)
    assert told == beside_engines("amd") + beside_engines("intel")
    (line,) = re.findall(r"a token of it takes (.*?) ms in float32\s+and (.*?) in\s+bfloat16", README.read_text())
    two = [row for row in told if row.startswith("| 125M") and "2 threads" in row]
    assert [row.split(" | ")[1] for row in two[:2]] == list(line)


def commands_of(page: Path) -> list[str]:
    """What follows `llama-fast` in code: a line of a block, up to its comment, or words between backticks; `a|b` is two commands."""
    text = page.read_text()
    blocks = "".join(re.findall("```.*?```", text, re.DOTALL))
    lines = re.findall(r"^(?:\$ )?(?:\w+=\S+ )*llama-fast ([a-z-].*?)(?: +#.*)?$", blocks, re.MULTILINE)
    quoted = re.findall(r"`llama-fast ([^`]+)`", re.sub("```.*?```", "", text, flags=re.DOTALL))
    each = (command.partition(" ") for command in lines + quoted)
    return [f"{name} {rest}" for names, _, rest in each for name in names.split("|")]


def parse(command: Any, arguments: list[str], parent: Any = None) -> None:
    """What the command line does with arguments before it runs anything. Raises what it would tell the user."""
    context = command.make_context(command.name, list(arguments), parent=parent)
    if hasattr(command, "commands"):
        _, subcommand, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(subcommand, rest, context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page):
    for command in commands_of(page):
        try:
            parse(get_command(app), shlex.split(command))
        except Exception as error:
            pytest.fail(f"llama-fast {command}: {error!r}")


def test_commands_are_found_and_wrong_ones_refused():
    assert len(commands_of(README)) > 10
    for wrong in ("bench nothing", "profile --no-such-option", "profile compare a", "generate --top-k many", "tell"):
        with pytest.raises(Exception, match=r"is not one of|No such|Missing parameter|valid integer"):
            parse(get_command(app), shlex.split(wrong))


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name
