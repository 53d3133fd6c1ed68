"""The steps from files to shards, each from one folder to the next:

    collect/    documents as they were read        work/     datatrove's logs and marks, signatures, records
    clean/      cleaned, filtered                  held_out/ what sources hold out, cleaned
    dedup/      without doubles                    state.json  settings and inputs of each step that has begun
    tokenizer/  trained on dedup/                  report.html, .md, .json
    mixture/    where sources have weights
    shards/     tokens; shards_held_out/ of held_out/

A step that is complete is not run again, and one that was killed goes on where a task ended.
"""

import itertools
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from datatrove.pipeline.base import PipelineStep

from ..bpe import copy_tokenizer, train_tokenizer
from ..config import Config
from ..documents import Fault, Function
from ..read.formats import read_file
from ..read.inputs import Input
from ..report import record
from ..shard_writer import ShardWriter
from ..steps import clean, filters
from ..steps.adapter import DOCUMENTS, ReadDocuments, ReadInputs, Step, WriteDocuments, read_documents
from ..steps.decontaminate import decontamination, write_index
from ..steps.dedup import remove_doubles
from ..steps.html import html
from ..steps.mask import masking
from ..steps.mixture import CountTokens, Mix, epochs, tokens_of_sources
from . import state, summary
from .executor import execute, processors
from .given import Given

STEPS = ("collect", "clean", "dedup", "tokenizer", "tokenize")
FOLDERS = {
    "collect": ("collect", "collect_held_out"), "clean": ("clean", "held_out"), "dedup": ("dedup",),
    "tokenizer": ("tokenizer",), "tokenize": ("mixture", "shards", "shards_held_out"),
}  # fmt: skip
_SMALL = 8_000_000
"""Bytes of input that one process has read before others have started (1 s)."""


class Progress(Protocol):
    """Is told, several times a second, what runs: documents so far, how many there will be if that is known, tasks done of all."""

    def __call__(self, what: str, documents: int, of_documents: int | None, tasks: int, of_tasks: int) -> None: ...


def _silent(what: str, documents: int, of_documents: int | None, tasks: int, of_tasks: int) -> None:
    pass


class Run:
    """A configuration at work in its output folder.

    Args:
        max_bad: share of what was read that may be faulty: lines, rows, files.

    Raises:
        ValueError: for the user: what is wrong with settings, inputs or what stands in the folder.
        OSError: a file cannot be read, or the disk is full.
    """

    def __init__(self, config: Config, *, max_bad: float = 0.01, progress: Progress = _silent, named: str = "") -> None:
        self.config, self.max_bad, self.progress, self.named = config, max_bad, progress, named
        self.out = Path(config.out).absolute()  # fsspec takes a relative path for the folder that had the name before
        self.work = self.out / "work"
        self._state = Path(config.out, "state.json")
        self._given = Given(config)

    def run(self, steps: Sequence[str] = STEPS, *, redo: str | None = None) -> None:
        """Runs these steps where they are not complete. `redo` names one that is forgotten first, with those after it."""
        if redo and redo not in steps:
            raise ValueError(
                f"--redo {redo} would throw away what is not made again: the steps that run are {', '.join(steps)}"
            )
        for name in steps:  # what is wrong with a late step is said before hours of early ones
            self._given.about(name)
        self.out.mkdir(parents=True, exist_ok=True)
        with state.only_one(Path(self.config.out)):
            if redo:
                self._forget(redo)
            for name in steps:
                if state.read_state(self._state).find(name) is None:
                    self._wipe(name)
            for name in steps:
                self._step(name)

    def _step(self, name: str) -> None:
        missing = [each for each in STEPS[: STEPS.index(name)] if not self._is_complete(each)]
        if missing:
            raise ValueError(
                f"step {missing[0]} is not complete in {self.config.out}, and {name} goes on from it: run it first"
            )
        for each in STEPS[: STEPS.index(name)]:  # what went before must have been made by the same settings
            state.begin(self._state, each, *self._given.about(each))
        (self.work / name).mkdir(parents=True, exist_ok=True)
        begun = state.begin(self._state, name, *self._given.about(name))
        if begun.complete:
            self._require_whole(name)
            return
        getattr(self, f"_{name}")()
        self._require_nothing_lost()
        state.end(self._state, name)

    def _is_complete(self, name: str) -> bool:
        step = state.read_state(self._state).find(name)
        return step is not None and step.complete

    def _require_whole(self, name: str) -> None:
        """Raises ValueError if what a complete step has written was taken away."""
        folder = Path(self.config.out, FOLDERS[name][0])
        there = len(list(folder.glob(DOCUMENTS)))
        if name in ("collect", "clean", "dedup") and there != self.config.tasks:
            raise ValueError(
                f"{folder} has {there} of {self.config.tasks} files, though step {name} was complete: do it again with --redo {name}"
            )

    def _require_nothing_lost(self) -> None:
        """Raises ValueError if a step was given fewer documents than the one before it has written."""
        for before, after in itertools.pairwise(self.records()):
            if before.documents_out != after.documents_in:
                raise ValueError(
                    f"{after.stage}: {after.name} has read {after.documents_in:,} documents, and {before.stage}: {before.name} "
                    f"had written {before.documents_out:,}: files in {self.config.out} were changed; do it again with --redo {before.stage}"
                )

    def _forget(self, name: str) -> None:
        later = STEPS[STEPS.index(name) :]
        state.forget(self._state, list(later))
        for step in later:
            self._wipe(step)

    def _wipe(self, name: str) -> None:
        """Removes what a step has left that is not in the state: its marks would pass for tasks that are complete.

        The marks go last, so that what was interrupted is gone on with. Where there are none, the folders are somebody else's.
        """
        marks = self.work / name
        there = [self.out / folder for folder in FOLDERS[name] if (self.out / folder).exists()]
        if there and not marks.is_dir():
            raise ValueError(f"{there[0]} is there, and no run of `llama-fast data` made it: choose another `out`")
        for folder in (*there, *([marks] if marks.is_dir() else [])):
            shutil.rmtree(folder)

    # the steps

    def _collect(self) -> None:
        inputs = self._given.inputs()
        if all(made.is_held_out for made in inputs):
            raise ValueError("all files of all sources are held out: nothing is left to train on")
        for folder, held_out in (("collect", False), ("collect_held_out", True)):
            chosen = [made for made in inputs if made.is_held_out == held_out]
            if chosen:
                read = ReadInputs("collect", chosen, self._records("collect", folder))
                self._execute("collect", folder, [read, WriteDocuments(self.out / folder)])
        self._refuse_too_many_faults()

    def _refuse_too_many_faults(self) -> None:
        steps = [step for step in self.records() if step.stage == "collect"]
        bad, good = sum(step.faults for step in steps), sum(step.documents_out for step in steps)
        if bad > self.max_bad * (bad + good):
            first = next(fault for step in steps for fault in step.named_faults)
            where = first.file if first.line is None else f"{first.file}:{first.line}"
            raise ValueError(
                f"{bad:,} of {bad + good:,} lines or files could not be read, more than --max-bad {100 * self.max_bad:g}%. "
                f"The first: {where} {first.reason}. {Path(self.config.out, 'report.md')} names them; mend them, or allow more"
            )
        if not good:
            raise ValueError(f"the {len(self._given.inputs())} files of all sources hold no documents")

    def _clean(self) -> None:
        changes = self._changes()
        if (self.out / "collect_held_out").is_dir():
            records = self._records("clean", "held_out")
            steps = [Step("clean", i, *each, records) for i, each in enumerate(changes)]
            read = ReadDocuments(self.out / "collect_held_out")
            self._execute("clean", "held_out", [read, *steps, WriteDocuments(self.out / "held_out")])
        chosen = [*changes, *filters.steps(self.config.filters), *self._decontamination()]
        records = self._records("clean", "clean")
        steps = [
            Step("clean", i, name, make, records, counted="masked" if name == "mask" else None)
            for i, (name, make) in enumerate(chosen)
        ]
        read = ReadDocuments(self.out / "collect")
        self._execute("clean", "clean", [read, *steps, WriteDocuments(self.out / "clean")])

    def _changes(self) -> list[tuple[str, Callable[[], Function]]]:
        """The cleaning that is on, by name."""
        chosen = self.config.clean
        mask = chosen.mask
        return [
            (name, make)
            for wanted, name, make in (
                (chosen.html, "HTML", lambda: html),
                (chosen.unicode, "Unicode", lambda: clean.unicode),
                (chosen.boilerplate, "boilerplate", lambda: clean.boilerplate),
                (chosen.repeated_lines, "repeated lines", lambda: clean.repeated_lines),
                (bool(mask), "mask", lambda: masking(mask)),
            )
            if wanted
        ]

    def _decontamination(self) -> list[tuple[str, Callable[[], Function]]]:
        ngram, index = self.config.decontaminate.ngram, self.work / "clean" / "evaluation"
        shutil.rmtree(index, ignore_errors=True)
        sets = [(name, _texts(inputs)) for name, inputs in self._given.evaluation_sets()]
        if self.config.decontaminate.held_out and (self.out / "held_out").is_dir():
            sets.append(("what is held out", (each.text for each in read_documents(self.out / "held_out"))))
        for name, texts in sets:
            write_index(index, name, texts, ngram=ngram)
        return [("decontamination", lambda: decontamination(index, ngram=ngram))] if sets else []

    def _dedup(self) -> None:
        work = self.work / "dedup"
        remove_doubles(
            self.out / "clean", self.out / "dedup", work, self.config.dedup, tasks=self.config.tasks,
            execute=lambda name, steps, tasks: self._execute("dedup", name, steps, tasks=tasks),
        )  # fmt: skip
        for scratch in ("singles", "signatures", "pairs"):
            shutil.rmtree(work / scratch, ignore_errors=True)

    def _tokenizer(self) -> None:
        chosen, folder = self.config.tokenizer, self.out / "tokenizer"
        if chosen.path:
            copy_tokenizer(chosen.path, folder)
            return
        expected = self._documents("dedup")
        if expected == 0:
            raise ValueError(
                f"no document is left to train a tokenizer on: {Path(self.config.out, 'report.md')} says which step removed them"
            )
        train_tokenizer(
            self._shown("tokenizer", expected, (each.text for each in read_documents(self.out / "dedup"))),
            folder,
            self._given.bpe(),
        )

    def _tokenize(self) -> None:
        documents = self._mixed() if self.config.weights else self.out / "dedup"
        tokenizer = Path(self.config.out, "tokenizer")  # as it is written: the shards name it
        self._execute(
            "tokenize", "shards", [ReadDocuments(documents), ShardWriter(str(self.out / "shards"), tokenizer)]
        )
        if (self.out / "held_out").is_dir():
            write = ShardWriter(str(self.out / "shards_held_out"), tokenizer)
            self._execute("tokenize", "shards held out", [ReadDocuments(self.out / "held_out"), write])

    def _mixed(self) -> Path:
        """The documents of all sources by weight."""
        counts, mixture, documents = self.work / "tokenize" / "tokens", self.out / "mixture", self.out / "dedup"
        count = CountTokens(self.out / "tokenizer", counts)
        self._execute("tokenize", "count tokens", [ReadDocuments(documents), count])
        times = epochs(tokens_of_sources(counts), self.config.weights, self.config.mixture.max_epochs)
        used = self.work / "tokenize" / "tokens_used"
        mix = Mix(times, self.config.seed, self.out / "tokenizer", used, self._records("tokenize", "mixture"))
        self._execute("tokenize", "mixture", [ReadDocuments(documents), mix, WriteDocuments(mixture)])
        return mixture

    # how steps are run

    def _execute(self, stage: str, name: str, steps: Sequence[PipelineStep], *, tasks: int | None = None) -> None:
        work = self.work / stage / re.sub(r"\W+", "_", name)
        beats = work / "beats"
        shutil.rmtree(beats, ignore_errors=True)
        for step in steps:
            if isinstance(step, ReadInputs | ReadDocuments):
                step.beats = beats
        expected = None if stage == "collect" else self._documents("collect" if stage == "clean" else "clean")
        with self._watched(f"{stage}: {name}" if name != stage else stage, work, expected, tasks or self.config.tasks):
            execute(
                steps, tasks=tasks or self.config.tasks, work=work, settings=self.config.executor, workers=self._workers()
            )  # fmt: skip

    def _workers(self) -> int:
        if self.config.executor.workers:
            return self.config.executor.workers
        written = sum(step.bytes_out for step in self.records() if step.stage == "collect" and step.name == "read")
        return 1 if 0 < written < _SMALL else processors()

    @contextmanager
    def _watched(self, what: str, work: Path, expected: int | None, tasks: int) -> Iterator[None]:
        """Tells `progress` what the tasks have left on disk, while they run."""
        ended = threading.Event()
        documents = 0

        def tell() -> None:
            nonlocal documents
            done = len(list((work / "completions").glob("*")))
            documents = max(documents, sum(_number(file) for file in (work / "beats").glob("*")))
            self.progress(what, documents, expected, done, tasks)

        def watch() -> None:
            while not ended.wait(0.2):
                tell()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        tell()

    def _shown(self, what: str, expected: int, texts: Iterable[str]) -> Iterator[str]:
        last = 0.0
        for count, text in enumerate(texts, 1):
            yield text
            if (now := time.monotonic()) > last + 0.2 or count == expected:
                last = now
                self.progress(what, count, expected, int(count == expected), 1)

    # what is known of outputs

    def _records(self, stage: str, name: str) -> Path:
        return summary.folder(self.work, stage, name)

    def records(self) -> list[record.Step]:
        """What the steps have counted so far, in their order."""
        return summary.records(self.work)

    def report(self) -> record.Report:
        """All that is known of the run."""
        return summary.report(self.config, self.named, complete=self._is_complete("tokenize"))

    def _documents(self, stage: str) -> int:
        steps = [step for step in self.records() if step.stage == stage]
        return steps[-1].documents_out if steps else 0


def _texts(inputs: Sequence[Input]) -> Iterator[str]:
    """Of an evaluation set. One that cannot be read whole would let through what it should keep out.

    Raises:
        ValueError: a part of it cannot be read.
    """
    for made in inputs:
        for item in read_file(made):
            if isinstance(item, Fault):
                raise ValueError(f"evaluation set {made.source.name!r}: {item.file}:{item.line or ''} {item.reason}")
            yield item.text


def _number(file: Path) -> int:
    try:
        return int(file.read_text() or 0)
    except OSError:
        return 0
