"""`make lifecycle LIFECYCLE=quick` without a kill, and with one in each stage: the models and scores have the same bits."""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity import not_interpreted

pytestmark = [pytest.mark.nightly, not_interpreted]

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "examples" / "lifecycle" / "lifecycle.py"


def driver(out: Path, *stages: str) -> subprocess.Popen:
    command = [sys.executable, str(DRIVER), "--quick", "--out", str(out), *stages]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def stages(out: Path) -> dict[str, float]:
    """The seconds of each, in their order."""
    found = json.loads((out / "lifecycle.json").read_text())["stages"]
    return {each["name"]: each["seconds"] for each in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    assert driver(out).wait() == 0
    return out


def test_a_second_run_takes_a_second(whole):
    start = time.monotonic()
    assert driver(whole).wait() == 0
    assert time.monotonic() - start < 2


def test_killed_in_each_stage(whole, tmp_path):
    for name, seconds in stages(whole).items():
        run = driver(tmp_path, name)
        time.sleep(0.2 + 0.6 * seconds)
        kill(run.pid)
        run.wait()
        with (tmp_path / "lock").open("w") as lock:  # until the last of them has ended
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert driver(tmp_path, name).wait() == 0
    for name in ("data/shards", "base", "tuned", "peft", "merged"):
        assert digest(tmp_path / name) == digest(whole / name)
    scores = [json.loads((out / "lifecycle.json").read_text())["scores"] for out in (whole, tmp_path)]
    assert scores[0] == scores[1]


def kill(pid: int) -> None:
    """A process and all that it has started, itself first."""
    for each in list(family(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(FileNotFoundError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".ds", ".safetensors"))
    assert files
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
