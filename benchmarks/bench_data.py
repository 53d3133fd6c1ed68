"""Documents and MB a second of each step of `llama-fast data`, beside the block of datatrove's that does the same, with spaCy's words.

    python -m llama_fast.benchmarks.bench_data [--collection pydoc] [--documents 400] [--rounds 3]

One thread, no files but those a step is for, the same documents in the same order; sides take turns, and the median of the rounds counts.
Beside each figure stands how many documents a side kept, or tokens it wrote: sides that differ there have not done the same work. What
is not installed is named. Whole runs, reading and writing included, are what `report.html` of a run shows.
"""

import argparse
import contextlib
import copy
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import get_filter_result
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.logging import logger

from llama_fast.data.bpe import EOS, BpeConfig, train_tokenizer
from llama_fast.data.config import Filters, GopherQuality, GopherRepetition, Source
from llama_fast.data.documents import Document, Fault, Function, Removed
from llama_fast.data.read.formats import read_file
from llama_fast.data.read.inputs import list_inputs
from llama_fast.data.shard_writer import ShardWriter
from llama_fast.data.sources import NAMES, collect
from llama_fast.data.steps import clean, filters
from llama_fast.data.steps.decontaminate import decontamination, write_index
from llama_fast.data.steps.dedup import content
from llama_fast.data.steps.mask import masking
from llama_fast.data.steps.words import HASH, WORDS

Side = Callable[[list[Document]], int]
"""Does the step, and counts what it kept or wrote."""

NEEDS_SPACY = "not measured: spaCy is not installed (pip install spacy nltk)"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of each step of `llama-fast data`.")
    parser.add_argument("--collection", choices=NAMES, default="pydoc", help="whose text (default: pydoc)")
    parser.add_argument("--documents", type=int, default=400, help="at most so many")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logger.remove()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = collect(args.collection)
    documents = list(itertools.islice(_read(folder), args.documents))
    megabytes = sum(len(document.text.encode()) for document in documents) / 1e6
    print(f"{len(documents):,} documents of {args.collection}, {megabytes:.2f} MB")
    print(f"{'step':22}{'side':12}{'documents/s':>12}{'MB/s':>9}{'counted':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        for step, sides in _steps(folder, documents, Path(temporary)):
            for name, seconds, counted in _measured(sides, documents, args.rounds):
                if isinstance(counted, str):
                    print(f"{step:22}{name:12}{counted}")
                else:
                    print(f"{step:22}{name:12}{len(documents) / seconds:12,.0f}{megabytes / seconds:9.2f}{counted:10,}")


def _measured(
    sides: dict[str, Side | str], documents: Sequence[Document], rounds: int
) -> Iterator[tuple[str, float, int | str]]:
    """(side, median of seconds, what it counted), or why it was not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    counted: dict[str, int | str] = {name: side for name, side in sides.items() if isinstance(side, str)}
    for _ in range(rounds):
        for name, side in sides.items():
            if isinstance(side, str):
                continue
            given = copy.deepcopy(list(documents))
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # datatrove's progress bars
                start = time.perf_counter()
                counted[name] = side(given)
                seconds[name].append(time.perf_counter() - start)
    for name in sides:
        yield name, statistics.median(seconds[name] or [0.0]), counted[name]


def _steps(folder: Path, documents: Sequence[Document], temporary: Path) -> Iterator[tuple[str, dict[str, Side | str]]]:
    """Each step and its sides, ours first."""
    yield "read JSON Lines", {"llama-fast": _reading(folder), "datatrove": _their_reading(folder)}
    yield "Unicode", {"llama-fast": _function(clean.unicode), "datatrove": _block(FTFYFormatter())}
    yield "boilerplate", {"llama-fast": _function(clean.boilerplate)}
    yield "repeated lines", {"llama-fast": _function(clean.repeated_lines)}
    yield "mask", {"llama-fast": _function(masking(("email", "phone", "card"))), "datatrove": _block(PIIFormatter())}
    yield "length", {"llama-fast": _function(filters.length(Filters()))}
    spacy = find_spec("spacy") is not None
    yield (
        "quality (Gopher)",
        {
            "llama-fast": _function(filters.gopher_quality(GopherQuality())),
            "datatrove": _filter(GopherQualityFilter()) if spacy else NEEDS_SPACY,
        },
    )
    yield (
        "repetition (Gopher)",
        {
            "llama-fast": _function(filters.gopher_repetition(GopherRepetition())),
            "datatrove": _filter(GopherRepetitionFilter()) if spacy else NEEDS_SPACY,
        },
    )
    write_index(temporary / "index", "the last document", [documents[-1].text], ngram=13)
    yield "decontamination", {"llama-fast": _function(decontamination(temporary / "index", ngram=13))}
    yield "exact hash", {"llama-fast": lambda given: len({content(document) for document in given})}
    config = MinhashConfig(hash_config=HASH)
    yield (
        "MinHash signatures",
        {
            "llama-fast": _consumer(MinhashDedupSignature(str(temporary / "ours"), config, language=WORDS)),
            "datatrove": _consumer(MinhashDedupSignature(str(temporary / "theirs"), config)) if spacy else NEEDS_SPACY,
        },
    )
    tokenizer = temporary / "tokenizer"
    yield "train a tokenizer", {"llama-fast": lambda given: _trained(given, tokenizer)}
    yield "tokenize", {
        "llama-fast": _writer(ShardWriter(str(temporary / "shards"), tokenizer), temporary / "shards"),
        "datatrove": _writer(
            DocumentTokenizer(str(temporary / "ds"), str(tokenizer / "tokenizer.json"), eos_token=EOS, shuffle_documents=False),
            temporary / "ds",
        ),
    }  # fmt: skip


def _read(folder: Path) -> Iterator[Document]:
    source = Source("text", str(folder), language="en")
    for made in list_inputs(source):
        for document in read_file(made):
            if isinstance(document, Fault):
                raise ValueError(f"{document.file}: {document.reason}")
            yield document


def _reading(folder: Path) -> Side:
    return lambda given: sum(1 for _ in itertools.islice(_read(folder), len(given)))


def _their_reading(folder: Path) -> Side:
    return lambda given: sum(1 for _ in JsonlReader(str(folder), limit=len(given), recursive=True).run())


def _function(function: Function) -> Side:
    return lambda given: sum(not isinstance(function(document), Removed) for document in given)


def _filter(block: PipelineStep) -> Side:
    return lambda given: sum(get_filter_result(block.filter(document))[0] for document in given)


def _block(block: PipelineStep) -> Side:
    return lambda given: sum(1 for _ in block.run(iter(given)))


def _consumer(block: PipelineStep) -> Side:
    def consume(given: list[Document]) -> int:
        block.run(iter(given))
        return len(given)

    return consume


def _trained(given: list[Document], folder: Path) -> int:
    return train_tokenizer((document.text for document in given), folder, BpeConfig(vocab_size=4096)).vocab_size


def _writer(block: PipelineStep, folder: Path) -> Side:
    def write(given: list[Document]) -> int:
        block.run(iter(given), 0, 1)
        return sum(path.stat().st_size for path in folder.glob("*.ds")) // 2

    return write


if __name__ == "__main__":
    main()
