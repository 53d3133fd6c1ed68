"""Sources mixed by weight: each gets its share of the tokens, as the tokenizer of the run counts them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import xxhash
from datatrove.pipeline.base import PipelineStep

from ...decoder.tokenizer import Tokenizer
from ...reports.jsonfile import read_json, write_json
from ..documents import Document
from ..report.record import Count, Step
from .adapter import Tally

_BATCH = 1000


class CountTokens(PipelineStep):  # type: ignore[misc]
    """Counts the tokens of each source, and writes them beside the records of steps."""

    type, name = "llama-fast", "count tokens"

    def __init__(self, tokenizer: Path, folder: Path) -> None:
        super().__init__()
        self.tokenizer, self.folder = tokenizer, folder

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        backend = Tokenizer(self.tokenizer).backend  # without the padding and truncation that its file may ask for
        backend.encode_special_tokens = True  # as `ShardWriter` does
        counted: dict[str, int] = {}
        for document in data:
            source = document.metadata["source"]
            counted[source] = counted.get(source, 0) + len(backend.encode(document.text, add_special_tokens=False))
        self.folder.mkdir(parents=True, exist_ok=True)
        step = Step("mixture", "count", counts=[Count(source, times) for source, times in sorted(counted.items())])
        write_json(self.folder / f"{rank:05d}.json", step)


def tokens_of_sources(folder: Path) -> dict[str, int]:
    """What `CountTokens` has counted in all tasks."""
    total: dict[str, int] = {}
    for file in sorted(folder.glob("*.json")):
        for count in read_json(file, Step).counts:
            total[count.what] = total.get(count.what, 0) + count.times
    return total


def epochs(tokens: Mapping[str, int], weights: Mapping[str, float], max_epochs: float) -> dict[str, float]:
    """How often each document of a source comes, so that tokens are as the weights and no source comes more than `max_epochs` times.

    Raises:
        ValueError: nothing is left of a source.
    """
    if empty := [name for name in weights if not tokens.get(name)]:
        raise ValueError(f"source {empty[0]!r} has a weight and no text is left of it: the report says why")
    total = min(max_epochs * tokens[name] / weight for name, weight in weights.items())
    return {name: total * weight / tokens[name] for name, weight in weights.items()}


class Mix(PipelineStep):  # type: ignore[misc]
    """Repeats or leaves out documents by source, evenly over each task: two of five of a source that comes 0.4 times.

    Where that begins is decided by seed, source and task. Drawing each document alone would miss the share by several percent
    in a source of a few hundred.
    """

    type, name = "llama-fast", "mixture"

    def __init__(self, times: Mapping[str, float], seed: int, records: Path) -> None:
        super().__init__()
        self.times, self.seed, self.records = dict(times), seed, records

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = Tally("tokenize", self.name)
        yield from tally.going(self._mixed(tally.coming(data), tally, rank))
        tally.write(self.records, 1, rank)

    def _mixed(self, documents: Iterator[Document], tally: Tally, rank: int) -> Iterator[Document]:
        due = {
            source: xxhash.xxh3_64_intdigest(f"{self.seed}:{source}:{rank}".encode()) / 2**64 for source in self.times
        }
        for document in documents:
            source = document.metadata["source"]
            due[source] += self.times[source]
            if due[source] < 1:
                tally.remove(document, f"{source} has more than its share")
            while due[source] >= 1:
                due[source] -= 1
                yield document
