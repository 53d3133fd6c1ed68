"""The worker protocol, by a fake engine: what is asked is answered, and what goes wrong is said."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_fast.benchmarks.engines.process import Program, Worker, ours, peer
from tests.parity import not_interpreted

pytestmark = [
    not_interpreted,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
]

FAKE = Program(Path(__file__).with_name("fake_engine.py"), Path(sys.executable))
SIZES: dict[str, Any] = dict(threads=1, batch=2, context=8, tokens=16)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(FAKE, threads=1)
    yield made
    made.close()


def test_what_is_asked_is_answered_whatever_the_engine_prints(worker: Worker) -> None:
    assert worker.version == "fake 1.0"
    worker.load(Path("100"), torch.float32, **SIZES)
    times, ids = worker.generate([[1, 2], [3, 4]], 3)
    assert ids == [[102, 103, 104], [104, 105, 106]]
    assert len(times) == 3 and times == sorted(times)
    expected = torch.tensor([[2.0, 20.0, 200.0], [3.0, 30.0, 300.0]])
    assert torch.equal(worker.logits([2, 3]), expected)


def test_memory_is_that_of_its_process(worker: Worker) -> None:
    worker.load(Path("1"), torch.float32, **SIZES)
    before, imported = worker.peak, worker.imported
    worker.generate([[1]], 200)  # holds 200 MiB
    assert before is not None and imported is not None and worker.peak is not None
    assert 200 << 20 <= worker.peak - imported < 300 << 20 and before < worker.peak


def test_a_peak_can_be_left_behind(worker: Worker) -> None:
    worker.load(Path("1"), torch.float32, **SIZES)
    worker.generate([[1]], 200)
    peak = worker.peak
    worker.generate([[1]], 1)  # gives the 200 MiB back
    worker.forget_peak()
    assert peak is not None and worker.peak is not None and worker.peak < peak - (150 << 20)
    worker.generate([[1]], 200)
    assert worker.peak > peak - (50 << 20)


def test_an_error_is_said_and_the_engine_goes_on(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no bfloat16 here"):
        worker.load(Path("1"), torch.bfloat16, **SIZES)
    worker.load(Path("1"), torch.float32, **SIZES)
    assert worker.generate([[1]], 1)[1] == [[2]]


def test_an_engine_that_ends_says_how(worker: Worker) -> None:
    worker.load(Path("1"), torch.float32, **SIZES)
    for new in (13, 1):  # it ends in the first, and is not there for the second
        with pytest.raises(RuntimeError, match="ended with status 7: the last thing it says"):
            worker.generate([[1]], new)


def test_an_engine_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package")
    with pytest.raises(
        RuntimeError, match="ended with status 1: ModuleNotFoundError: No module named 'no_such_package'"
    ):
        Worker(Program(tmp_path / "broken.py", Path(sys.executable)), threads=1)


def test_a_closed_one_is_gone() -> None:
    worker = Worker(FAKE, threads=1)
    os.kill(worker.pid, 0)
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_peer_is_there_when_it_was_installed_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_fast.benchmarks.engines.process.ENVIRONMENTS", tmp_path)
    (tmp_path / "llama_cpp" / "bin").mkdir(parents=True)
    (tmp_path / "llama_cpp" / "bin" / "python").touch()
    assert ours().is_installed and not peer("llama_cpp").is_installed
    (tmp_path / "llama_cpp" / ".installed").touch()
    assert peer("llama_cpp").is_installed


def test_an_interrupt_leaves_nothing_that_keeps_python_from_ending(worker: Worker, monkeypatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(worker._process, "stdout", SimpleNamespace(readline=_interrupt, close=lambda: None))
    with pytest.raises(KeyboardInterrupt):
        worker.load(Path("1"), torch.float32, **SIZES)
    for thread in set(threading.enumerate()) - before:
        thread.join(1)
        assert not thread.is_alive()


def _interrupt() -> str:
    raise KeyboardInterrupt
