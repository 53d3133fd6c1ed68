"""docs/profiling.md describes the file that is written, and its example runs."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from llama_fast.profiler import result
from llama_fast.profiler.measure import limits
from tests.parity import not_interpreted

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiling.md"
CLASSES = [
    result.Profile, limits.Limits, result.Run, result.Latency, result.Waterfall, result.Part, result.Kernel,
    result.ContextPoint, result.Ablation, result.Trust,
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_is_described_and_no_other(kind):
    schema = PAGE.read_text().split("## profile.json")[1]
    (table,) = re.findall(rf"### {kind.__name__}\n\n\| field .*\n.*\n((?:\|.*\n)+)", schema)
    described = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(described) == sorted(field.name for field in fields(kind))


def test_every_kind_of_part_is_described():
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith("| `kind`"))
    assert set(re.findall(r"`([a-z-]+)`", row)) - {"kind"} == set(result.KINDS)


@not_interpreted
def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(example, {})
    printed = capsys.readouterr().out
    assert re.match(r"\d+ us: floor \d+, ", printed)


def test_the_picture_is_there():
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE.read_text()):
        assert (PAGE.parent / name).stat().st_size < 200_000
