"""The settings in examples/lifecycle are valid, and docs/lifecycle.md shows the commands that are run."""

from pathlib import Path

import pytest

from llama_fast.config_file import read_config
from llama_fast.data.config import Config
from llama_fast.train.config import TrainConfig
from tests.lifecycle.conftest import FOLDER

PAGE = Path(__file__).parents[2] / "docs" / "lifecycle.md"


@pytest.mark.parametrize(
    ("name", "kind"), [("data", Config), ("pretrain", TrainConfig), ("tune", TrainConfig), ("adapter", TrainConfig)]
)
def test_settings(name, kind):
    read_config(FOLDER / f"{name}.toml", kind)


def test_ten_million_tokens():
    configs = [read_config(FOLDER / f"{name}.toml", TrainConfig) for name in ("pretrain", "tune")]
    assert 9.9e6 < sum(config.schedule.steps * config.batch.tokens for config in configs) < 10.1e6
    adapter = read_config(FOLDER / "adapter.toml", TrainConfig)
    assert 0.4e6 < adapter.schedule.steps * adapter.batch.tokens < 0.5e6, "beside them"


def test_docs_show_the_commands(program, tmp_path, monkeypatch):
    life = program("lifecycle")
    monkeypatch.setattr(life, "HERE", tmp_path / "examples" / "lifecycle")
    run = life.Run(tmp_path / "runs" / "lifecycle", quick=False)
    block = PAGE.read_text().split("```\n$ ")[1].split("```")[0]
    assert block.splitlines() == [
        run.command(name) if i == 0 else f"$ {run.command(name)}" for i, name in enumerate(life.STAGES)
    ]


def test_a_bar_is_missed_and_a_goal_may_be(program):
    report = program("report")
    row = {"before": [2.4, 2.3, 2.5], "baselines": {"xz -9 after the training text": 2.5}}
    assert [bar[::3] for bar in report.below_xz(row, "plays", "bar")] == [("bar", True), ("goal", False)]
    shares = {"exact copies found": 1.0, "near copies found": 0.98, "clean documents lost": 0.002}
    assert [bar[3] for bar in report.planted(shares, "bar")] == [True, False, False]


def test_an_adapter_that_only_copies_is_a_goal_missed(program):
    report = program("report")
    change = {"of": "adapted", "against": "copied", "task": "reversed", "low": -1.0, "high": 2.0, "verdict": "same"}
    its = {"same": 11, "of": 12}
    goal, bar = report.adapter({"changes": [change], "use": {"adapter": its}})
    assert goal[::3] == ("goal", False) and goal[2] == "-1.0 to +2.0"
    assert bar[::3] == ("bar", False) and bar[2] == "11 of 12"
