"""Engines that run in processes of their own, each by the Python of its own environment; `make peers` makes those of the others."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llama_fast

_HERE = Path(__file__).resolve().parent
ENVIRONMENTS = _HERE.parents[1] / ".cache" / "peers"
"""Of a clone; what `make peers` has made whole has a file `.installed`."""

_MOST_SECONDS = 900.0  # that an answer takes: who says nothing for longer is ended


@dataclass(frozen=True)
class Program:
    """An engine's file, which `worker.py` runs, and the Python that runs it."""

    file: Path
    python: Path

    @property
    def is_installed(self) -> bool:
        return self.python == Path(sys.executable) or (self.python.parents[1] / ".installed").is_file()


def ours() -> Program:
    return Program(_HERE / "llama_fast_engine.py", Path(sys.executable))


def peer(name: str) -> Program:
    """The engine `<name>_engine.py` in the environment of that name."""
    return Program(_HERE / f"{name}_engine.py", ENVIRONMENTS / name / "bin" / "python")


class Worker:
    """A process that runs a program, from its start until it is closed.

    Every method but `close` raises RuntimeError, with what the engine said, where it fails or ends.

    Attributes:
        version: of the engine.
        pid: of the process.
        imported: bytes of memory that it had when all was imported and nothing loaded; None where no system tells.
    """

    def __init__(self, program: Program, *, threads: int) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            [program.python, _HERE / "worker.py", program.file], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._stderr, text=True, env=_environment(program, threads),
        )  # fmt: skip
        self.pid = self._process.pid
        try:
            self.version: str = self._answer()["version"]
        except RuntimeError:
            self.close()
            raise
        self.imported = self._memory("VmRSS")

    def load(self, model: Path, dtype: torch.dtype, *, threads: int, batch: int, context: int, tokens: int) -> None:
        """Loads a model, with room for `batch` sequences of at most `context` tokens, `tokens` in all."""
        self._ask(
            "load", model=str(model), dtype=str(dtype).removeprefix("torch."), threads=threads, batch=batch,
            context=context, tokens=tokens,
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[float], list[list[int]]]:
        """See `worker.Engine.generate`."""
        done = self._ask("generate", prompts=prompts, new=new)
        return done["times"], done["token_ids"]

    def logits(self, ids: list[int]) -> Tensor:
        """The logits (tokens, vocab) float32 after each token of one sequence."""
        with tempfile.NamedTemporaryFile() as file:
            self._ask("logits", ids=ids, file=file.name)
            return torch.from_numpy(np.fromfile(file.name, dtype=np.float32)).view(len(ids), -1)

    @property
    def peak(self) -> int | None:
        """Bytes of memory that it has had at most, mapped files too; None where no system tells."""
        return self._memory("VmHWM")

    def forget_peak(self) -> None:
        """From now on `peak` is of what it has now, and will have."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        try:
            self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._stderr.close()

    def _ask(self, do: str, **given: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says how
            print(json.dumps({"do": do, **given}), file=self._process.stdin, flush=True)
        said = self._answer()
        if "error" in said:
            raise RuntimeError(said["error"])
        return said

    def _answer(self) -> dict[str, Any]:
        limit = threading.Timer(_MOST_SECONDS, self._process.kill)
        limit.start()
        try:
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        finally:  # Python ends only when its timers have
            limit.cancel()
        if not line:
            self._stderr.seek(0)
            last = next(iter(self._stderr.read().splitlines()[-1:]), "it said nothing")
            raise RuntimeError(f"its process ended with status {self._process.wait()}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _memory(self, field: str) -> int | None:
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _environment(program: Program, threads: int) -> dict[str, str]:
    """Ours finds the package that is imported here; others nothing of it."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": str(threads)}
    if program.python == Path(sys.executable):
        own["PYTHONPATH"] = str(Path(llama_fast.__file__).parents[1])
    return own
