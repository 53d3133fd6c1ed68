"""What the README shows runs as it stands there."""

import itertools
import json
import re
import statistics
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


def test_the_figures_of_the_readme_are_those_of_the_files_it_names():
    rows = re.findall(r"^\| (float32|bfloat16), batch (\d) \| (.*) \|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for dtype, batch, cells in rows:
        file = README.parent / f"benchmarks/results/older/generate-125m-{dtype}-batch{batch}.json"
        sides = {side["name"]: side for side in json.loads(file.read_text())["results"]}
        theirs, ours = (sides[name] for name in ("transformers", "llama-fast"))
        first = [1e3 * statistics.median(side["first_token_s"]) for side in (theirs, ours)]
        inter = [1e3 * statistics.median(itertools.chain(*side["inter_token_s"])) for side in (theirs, ours)]
        speed = [1e3 * int(batch) / each for each in inter]
        told = [cell.split(" / ") for cell in cells.split(" | ")[:4]]
        for figures, texts, digits in ((first, told[0], 0), (inter, told[1], 1), (speed, told[2], 0)):
            assert texts == [f"{figure:.{digits}f}" for figure in figures], (dtype, batch)
        assert told[3] == [f"{inter[0] / inter[1]:.2f}x"]


def test_links_lead_somewhere():
    root = README.parent
    for page in (README, root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")):
        text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name
