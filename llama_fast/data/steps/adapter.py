"""Between our functions and datatrove's pipelines: one adapter that runs them, and counts what they do.

Each step of a task leaves a record beside datatrove's logs. A task that is run again writes it anew.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from math import log2
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import orjson
import pyarrow as pa
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter

from ...reports.jsonfile import read_json, write_json
from ..documents import Document, Fault, Function, Removed, byte_length
from ..read.formats import read_file
from ..read.inputs import Input
from ..report import record

DOCUMENTS = "*.jsonl.zst"
"""What a folder of documents holds: one file a task, and nothing that is not whole."""


class Tally:
    """Counts for one step of one task."""

    def __init__(self, stage: str, name: str) -> None:
        self.step = record.Step(stage, name)
        self._removed: dict[str, record.Removal] = {}
        self._counts: dict[str, record.Count] = {}
        self._upstream = 0.0

    def coming(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that come in. The time that earlier steps take for them is not this step's."""
        iterator = iter(documents)
        while True:
            started = perf_counter()
            document = next(iterator, None)
            self._upstream += perf_counter() - started
            if document is None:
                return
            size = byte_length(document)
            self.step.documents_in += 1
            self.step.bytes_in += size
            self.step.lengths_in[_bin(size)] += 1
            yield document

    def going(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents that go out."""
        while True:
            started = perf_counter()
            document = next(documents, None)
            self.step.seconds += perf_counter() - started
            if document is None:
                self.step.seconds -= self._upstream
                return
            size = byte_length(document)
            self.step.documents_out += 1
            self.step.bytes_out += size
            self.step.lengths_out[_bin(size)] += 1
            yield document

    def consumed(self, documents: Iterable[Document], consume: Callable[[Iterator[Document]], None]) -> None:
        """The documents go into `consume`, which keeps none from whoever reads them next."""
        started = perf_counter()
        consume(self.coming(documents))
        self.step.seconds = perf_counter() - started - self._upstream
        self.step.documents_out, self.step.bytes_out = self.step.documents_in, self.step.bytes_in
        self.step.lengths_out = list(self.step.lengths_in)

    def remove(self, document: Document, reason: str) -> None:
        removal = self._removed.setdefault(reason, record.Removal(reason, 0))
        removal.documents += 1
        if len(removal.examples) < record.EXAMPLES:
            removal.examples.append(record.Example(_place(document), document.text[:200]))

    def count(self, what: str, times: int = 1) -> None:
        self._counts.setdefault(what, record.Count(what, 0)).times += times

    def fault(self, fault: Fault) -> None:
        self.step.faults += 1
        if len(self.step.named_faults) < record.FAULTS_NAMED:
            self.step.named_faults.append(record.NamedFault(fault.file, fault.line, fault.reason))

    def write(self, folder: Path, place: int, rank: int) -> None:
        self.step.removed = list(self._removed.values())
        self.step.counts = list(self._counts.values())
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{place:02d}-{rank:05d}.json", self.step)


def _bin(size: int) -> int:
    return min(record.BINS - 1, int(2 * log2(size))) if size else 0


def _place(document: Document) -> str:
    about = document.metadata
    return f"{about['file']}:{about['line']}" if "file" in about else document.id


class Step(PipelineStep):  # type: ignore[misc]
    """A function as a step of datatrove's.

    `make` gives the function and is called once in each process, so that what it holds need not be pickled. What it counts
    within a document stands in the document's metadata under `counted`.
    """

    type = "llama-fast"

    def __init__(
        self, stage: str, place: int, name: str, make: Callable[[], Function], records: Path, *, counted: str | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.stage, self.place, self.name, self.make, self.records, self.counted = (
            stage, place, name, make, records, counted
        )  # fmt: skip

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = Tally(self.stage, self.name)
        yield from tally.going(self._kept(tally.coming(data), tally))
        tally.write(self.records, self.place, rank)

    def _kept(self, documents: Iterator[Document], tally: Tally) -> Iterator[Document]:
        function = self.make()
        for document in documents:
            before = document.text
            verdict = function(document)
            if isinstance(verdict, Removed):
                tally.remove(Document(before, document.id, metadata=document.metadata), verdict.reason)
                continue
            tally.step.changed += verdict.text != before
            for what, times in verdict.metadata.get(self.counted, {}).items() if self.counted else ():
                tally.count(what, times)
            yield verdict


class Counted(PipelineStep):  # type: ignore[misc]
    """A filter of datatrove's that sees all documents at once, counted as ours are.

    It tells what it removes to an "exclusion writer", which is this step's tally.
    """

    type = "llama-fast"

    def __init__(self, stage: str, place: int, name: str, block: PipelineStep, reason: str, records: Path) -> None:
        super().__init__()
        self.stage, self.place, self.name, self.block, self.reason, self.records = (
            stage, place, name, block, reason, records
        )  # fmt: skip

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = Tally(self.stage, self.name)
        self.block.exclusion_writer = _Removals(tally, self.reason)
        yield from tally.going(self.block.run(tally.coming(data), rank, world_size))
        tally.write(self.records, self.place, rank)


class _Removals:
    def __init__(self, tally: Tally, reason: str) -> None:
        self.tally, self.reason = tally, reason

    def __enter__(self) -> "_Removals":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        self.tally.remove(document, self.reason)


class Consumed(PipelineStep):  # type: ignore[misc]
    """A block of datatrove's that takes documents and gives none, such as one that writes signatures: timed, and all are kept."""

    type = "llama-fast"

    def __init__(self, stage: str, place: int, name: str, block: PipelineStep, records: Path) -> None:
        super().__init__()
        self.stage, self.place, self.name, self.block, self.records = stage, place, name, block, records

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        tally = Tally(self.stage, self.name)
        tally.consumed(data, lambda documents: self.block.run(documents, rank, world_size))
        tally.write(self.records, self.place, rank)


class ReadInputs(PipelineStep):  # type: ignore[misc]
    """Reads files: of N tasks each reads every N-th. What cannot be read is counted and named."""

    type, name = "llama-fast", "read"
    beats: Path | None = None

    def __init__(self, stage: str, inputs: list[Input], records: Path) -> None:
        super().__init__()
        self.stage, self.inputs, self.records = stage, inputs, records

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = Tally(self.stage, self.name)
        yield from _beating(tally.going(self._documents(self.inputs[rank::world_size], tally)), self.beats, rank)
        tally.write(self.records, 0, rank)

    def _documents(self, inputs: list[Input], tally: Tally) -> Iterator[Document]:
        for made in inputs:
            for item in read_file(made):
                if isinstance(item, Fault):
                    tally.fault(item)
                else:
                    tally.step.documents_in += 1
                    tally.step.bytes_in += byte_length(item)
                    yield item


class ReadDocuments(PipelineStep):  # type: ignore[misc]
    """Reads the documents that a task of the same number has written."""

    type, name = "llama-fast", "read documents"
    beats: Path | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from _beating(read_documents(self.folder / f"{rank:05d}.jsonl.zst"), self.beats, rank)


def _beating(documents: Iterator[Document], folder: Path | None, rank: int) -> Iterator[Document]:
    """Leaves the number of documents so far in a file, four times a second, for whoever shows progress."""
    if folder is None:
        yield from documents
        return
    folder.mkdir(parents=True, exist_ok=True)
    count, last = 0, 0.0
    for count, document in enumerate(documents, 1):
        yield document
        if (now := monotonic()) > last + 0.25:
            last = now
            (folder / f"{rank:05d}").write_text(str(count))
    (folder / f"{rank:05d}").write_text(str(count))


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file, or of a folder of such files in their order.

    Raises:
        ValueError: a file was cut off. Arrow's streams say so; zstandard's own end there as if that were all.
    """
    for file in sorted(path.glob(DOCUMENTS)) if path.is_dir() else [path]:
        try:
            with io.BufferedReader(pa.input_stream(str(file), compression="zstd")) as lines:
                for line in lines:
                    yield Document(**orjson.loads(line))
        except (OSError, orjson.JSONDecodeError) as error:
            raise ValueError(
                f"{file} was cut or changed ({error}): do the step that wrote it again with --redo"
            ) from None


class WriteDocuments(JsonlWriter):  # type: ignore[misc]
    """Writes a task's documents, whole or not at all: the file gets its name when it is complete. It is there if it is empty too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(str(folder), "${rank}.jsonl.partial.zst", compression="zstd")

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        return {"text": document.text, "id": document.id, "metadata": document.metadata}

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        partial = self.folder / f"{rank:05d}.jsonl.partial.zst"
        self.output_mg.get_file(partial.name)
        yield from super().run(data, rank, world_size)
        partial.rename(self.folder / f"{rank:05d}.jsonl.zst")


def read_records(folder: Path) -> list[record.Step]:
    """The steps of a stage that is complete, each over all its tasks."""
    by_place: dict[str, list[record.Step]] = {}
    for file in sorted(folder.glob("*.json")):
        by_place.setdefault(file.name.partition("-")[0], []).append(read_json(file, record.Step))
    return [record.merged(steps) for _, steps in sorted(by_place.items())]
