"""Result files: written whole or not at all, read back as they were, and refused by name if they are others."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_fast.benchmarks.peers import OURS
from llama_fast.benchmarks.suite.comparison import FORWARD
from llama_fast.benchmarks.suite.record import Record, Result, Skipped
from llama_fast.reports.jsonfile import read_json, write_json
from tests.benchmarks.fakes import LIMITS


@dataclass
class Other:
    name: str


def record() -> Record:
    results = [
        Result(
            "rms_norm",
            "4 x 8",
            "float32",
            FORWARD,
            OURS,
            [1.25e-6, 1.5e-6],
            error=1e-8,
            peer_error=2e-8,
            bound=1.6e-7,
            read=9,
        ),
        Result("rms_norm", "4 x 8", "float32", FORWARD, "wrong", failure="FAIL: error", note="a note"),
    ]
    return Record(
        {"threads": 2}, LIMITS, {"quick": True}, results, [Skipped("rms_norm", "Liger", "not here")], ["noisy"]
    )


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", record())
    assert read_json(tmp_path / "record.json", Record) == record()
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_figures_keep_six_digits(tmp_path: Path) -> None:
    kept = record()
    kept.results[0].samples[0] = 1.23456789e-6
    write_json(tmp_path / "record.json", kept)
    assert read_json(tmp_path / "record.json", Record).results[0].samples[0] == 1.23457e-6


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "record.json", record())
    whole = Path.write_text

    def until_the_disk_is_full(path: Path, text: str, **options: str) -> int:
        whole(path, text[: len(text) // 2], **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", until_the_disk_is_full)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "record.json", Record({}, LIMITS, {}))
    assert read_json(tmp_path / "record.json", Record) == record()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no Record file"), ("[]", "no Record file"), ('{"schema": 1}', "no Record file.*machine"),
        ('{"schema": 99}', "schema 99, and this version reads schema 1"), ("{}", "no Record file.*schema"),
    ],
)  # fmt: skip
def test_another_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"other.json is .*{message}"):
        read_json(path, Record)
    write_json(path, Other("x"))
    with pytest.raises(ValueError, match="no Record file"):
        read_json(path, Record)
    with pytest.raises(OSError, match="missing"):
        read_json(tmp_path / "missing.json", Record)
