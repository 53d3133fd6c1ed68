"""The whole life of a LLaMA, one stage after the other: from dirty text to a model that is tuned, judged, exported and used.

    python examples/lifecycle/lifecycle.py                  all stages that are not complete, in runs/lifecycle
    python examples/lifecycle/lifecycle.py --quick          the same with few tokens, in runs/lifecycle-quick
    python examples/lifecycle/lifecycle.py tune tuned       these stages alone

Each stage is one command, printed as you would type it in the run's folder. stamps/STAGE.json says that a stage is complete, and what
it was made of: its command, the files of this folder that it reads, and the stages before it. What was made of something else is
made anew; a stage that was killed is run again, and goes on where it was if its command can.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
PROGRAMS = {
    "llama-fast": ["-m", "llama_fast"],
    "torchrun": ["-m", "torch.distributed.run"],
    "python": [],
}


@dataclass(frozen=True)
class Stage:
    """A command, and what it makes.

    Attributes:
        command: paths are seen from the run's folder; `@name` is a file of this folder.
        makes: files and folders that are removed before the stage begins anew.
        needs: stages whose results it reads.
        quick: what --quick adds to the command, and `full` what a run without it does.
        goes_on: the command takes up what it has made before it was killed.
    """

    command: str
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    quick: str = ""
    full: str = ""
    goes_on: bool = False


TASKS = "modern.jsonl folio.jsonl stories questions summaries translation.toml"
EVALUATE = f"{TASKS} --chat --training-text training.txt"
LIMITS = dict(quick="--limit 4", full="--limit 300")
STAGES = {
    "raw": Stage("python @raw.py", ("raw", "planted.jsonl"), quick="--plays 2"),
    "data": Stage("llama-fast data run @data.toml", ("data",), ("raw",), goes_on=True),
    "planted": Stage("python @planted.py", ("planted.json", "training.txt", "modern.jsonl", "folio.jsonl"), ("raw", "data")),
    "pretrain": Stage(
        "torchrun --standalone --nproc-per-node 2 -m llama_fast.train @pretrain.toml", ("pretrain",), ("data",), goes_on=True,
        quick="--set schedule.steps=200 --set batch.rows=1 --set run.evaluate_every=50 --set run.validation_tokens=5000",
    ),
    "base": Stage("llama-fast train export pretrain base", ("base",), ("pretrain",)),
    "conversations": Stage(
        "python @conversations.py @translation.toml", ("tune.jsonl", "held_out.jsonl", "translation.jsonl", "translation.toml"),
        quick="--lines 2000 --stories 100",
    ),
    "tune": Stage(
        "torchrun --standalone --nproc-per-node 2 -m llama_fast.train @tune.toml", ("tune",), ("base", "conversations"),
        goes_on=True, quick="--set schedule.steps=80 --set batch.rows=1 --set run.evaluate_every=40",
    ),
    "tuned": Stage("llama-fast train export tune tuned", ("tuned",), ("tune",)),
    "before": Stage(f"llama-fast eval base {EVALUATE} --out before", ("before",), ("planted", "base", "conversations"), **LIMITS),
    "after": Stage(f"llama-fast eval tuned {EVALUATE} --out after", ("after",), ("planted", "tuned", "conversations"), **LIMITS),
    "reversed": Stage(
        "python @reversed.py @reversed.toml", ("reversed_tune.jsonl", "reversed_held_out.jsonl", "reversed.jsonl", "reversed.toml"),
        ("conversations",), quick="--lines 500",
    ),
    "adapter": Stage(
        "torchrun --standalone --nproc-per-node 2 -m llama_fast.train @adapter.toml", ("adapter",), ("tuned", "reversed"),
        goes_on=True, quick="--set schedule.steps=12 --set batch.rows=1 --set run.evaluate_every=6 --set run.save_every=6",
    ),
    "peft": Stage("llama-fast train export adapter peft --adapter", ("peft",), ("adapter",)),
    "merged": Stage("llama-fast train export adapter merged", ("merged",), ("adapter",)),
    "unadapted": Stage("llama-fast eval tuned reversed.toml --chat --out unadapted", ("unadapted",), ("tuned", "reversed"), **LIMITS),
    "adapted": Stage("llama-fast eval merged reversed.toml translation.toml --chat --out adapted", ("adapted",), ("merged", "reversed", "conversations"), **LIMITS),
    "copied": Stage("python @copied.py", ("copied",), ("after", "adapted")),
    "use": Stage("python @use.py", ("use.json",), ("base", "tuned", "conversations", "reversed", "peft", "merged")),
    "report": Stage("python @report.py @lifecycle.html.jinja", ("lifecycle.json", "report.html"), ("planted", "pretrain", "tune", "before", "after", "adapter", "unadapted", "adapted", "copied", "use"), "--quick"),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="300,000 tokens of training in all")
    parser.add_argument("--redo", action="store_true", help="also stages that are complete")
    parser.add_argument("--out", type=Path, help="the run's folder")
    asked = parser.parse_args()
    if unknown := [name for name in asked.stages if name not in STAGES]:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    run = Run(asked.out or Path("runs", "lifecycle-quick" if asked.quick else "lifecycle"), quick=asked.quick)
    try:
        with run.alone() as lock:
            for name in asked.stages or STAGES:
                run.do(name, lock, redo=asked.redo)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 1
    return 0


class Stopped(Exception):
    """Why no further stage is run."""


class Run:
    """A folder, and which stages are complete in it."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.stamps = folder / "stamps"
        self.stamps.mkdir(parents=True, exist_ok=True)

    def alone(self) -> IO[str]:
        """The lock of the folder. What a killed run has started holds it until it ends."""
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stopped(f"another run is at work in {self.folder}, or what one has started still is") from None
        return lock

    def do(self, name: str, lock: IO[str], *, redo: bool) -> None:
        """Runs a stage unless it is complete."""
        stage, key = STAGES[name], self.key(name)
        if missing := [each for each in stage.needs if not self.is_complete(each)]:
            raise Stopped(f"stage {name} needs {', '.join(missing)}: run that first")
        if self.is_complete(name) and not redo:
            print(f"== {name}: complete", flush=True)
            return
        if redo or not stage.goes_on or self.stamp(name).get("key") != key:
            for each in stage.makes:
                remove(self.folder / each)
        self.write(name, key=key)
        print(f"== {name}\n$ {self.command(name)}", flush=True)
        start = time.perf_counter()
        if code := self.wait(subprocess.Popen(self.arguments(name), cwd=self.folder, pass_fds=[lock.fileno()])):
            raise Stopped(f"stage {name} ended with status {code}; the same command goes on")
        self.write(name, key=key, command=self.command(name), seconds=round(time.perf_counter() - start, 1))

    def wait(self, child: subprocess.Popen) -> int:
        """Its exit status. Ctrl-C interrupts both: a run that is trained leaves a checkpoint before it ends."""
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                pass

    def command(self, name: str) -> str:
        """As it is typed in the run's folder."""
        stage = STAGES[name]
        text = f"{stage.command} {stage.quick if self.quick else stage.full}".strip()
        return text.replace("@", os.path.relpath(HERE, self.folder) + "/")

    def arguments(self, name: str) -> list[str]:
        program, *rest = shlex.split(self.command(name))
        return [sys.executable, *PROGRAMS[program], *rest]

    def key(self, name: str) -> str:
        """A hash of all that the stage is made of."""
        stage = STAGES[name]
        digest = hashlib.sha256(f"{stage.command} {stage.quick if self.quick else stage.full}".encode())
        for word in stage.command.split():
            if word.startswith("@"):
                digest.update((HERE / word[1:]).read_bytes())
        for each in stage.needs:
            digest.update(self.key(each).encode())
        return digest.hexdigest()

    def is_complete(self, name: str) -> bool:
        stamp = self.stamp(name)
        there = all((self.folder / each).exists() for each in STAGES[name].makes)
        return there and "seconds" in stamp and stamp["key"] == self.key(name)

    def stamp(self, name: str) -> dict:
        path = self.stamps / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, name: str, **what: object) -> None:
        path = self.stamps / f"{name}.json"
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(what))
        os.replace(unfinished, path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
