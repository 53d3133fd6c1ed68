"""What the README shows runs as it stands there."""

import re
from pathlib import Path

from tests.parity import not_interpreted

pytestmark = not_interpreted

README = Path(__file__).parents[2] / "README.md"


def run_example(page: Path, containing: str) -> dict:
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if containing in code
    )
    scope = {}
    exec(example, scope)
    return scope


def test_the_swap_example_runs(capsys):
    scope = run_example(README, ".fuse(")
    assert scope["write"].model.config._attn_implementation == "sdpa"
    output = capsys.readouterr().out
    assert "llama_fast.fuse, mode='inference'" in output
    assert "Once upon a time, there was" in output


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


def test_the_example_of_the_page_on_benchmarking_judges_and_times(capsys):
    run_example(README.parent / "docs" / "benchmarking.md", "OpCase(")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["llama-fast", "PyTorch", "by", "the"]
    assert all(re.search(r"\d us, error \d", line) for line in lines[:3])
    assert "FAIL: error" in lines[3] and " us" not in lines[3]
