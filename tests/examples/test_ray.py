"""examples/ray_batch.py on a Ray of this machine, with two actors of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parity import not_interpreted

pytestmark = [not_interpreted, pytest.mark.nightly]

ROOT = Path(__file__).parents[2]
ROWS = 240


def actors() -> list[int]:
    """Processes of this machine that hold a Summarizer, by the name that Ray gives them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        if b"Summarizer" in name and name.startswith(b"ray::"):
            found.append(int(process.name))
    return found


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for file in folder.glob("*.json*") for line in file.read_text().splitlines()]


def test_no_row_is_lost_or_doubled_where_an_actor_is_killed(tmp_path):
    pytest.importorskip("ray", reason='ray is not installed: pip install "llama-fast[ray]"')
    rows = [
        {
            "id": i,
            "text": f"Mia the owl went to the river. She had {i} pies. Emma was hungry. Mia gave her half of one.",
        }
        for i in range(ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "ray_batch.py"), "embedded", "rows.jsonl", "out", "--batch", "8"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
             "RAY_raylet_start_wait_time_s": "240"},
    )  # fmt: skip
    end = time.monotonic() + 300
    while len(actors()) < 2 or len(written(tmp_path / "out")) < 16:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "no two actors came to work"
        time.sleep(0.05)
    before = len(written(tmp_path / "out"))
    victim = actors()[0]
    os.kill(victim, signal.SIGKILL)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    found = written(tmp_path / "out")
    assert before < ROWS, "the actor was killed before all was done"
    assert sorted(row["id"] for row in found) == list(range(ROWS))
    assert all(row["output"] for row in found)
