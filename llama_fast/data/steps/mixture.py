"""Sources mixed by weight: each gets its share of the tokens, as the tokenizer of the run counts them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import xxhash
from datatrove.pipeline.base import PipelineStep

from ...decoder.tokenizer import Tokenizer
from ...reports.jsonfile import read_json, write_json
from ..documents import Document
from ..report.record import Count, Step
from .adapter import Tally


def _counting(tokenizer: Path) -> Callable[[Document], int]:
    """How many tokens a document has in a shard, without BOS and EOS; at least 1."""
    backend = Tokenizer(tokenizer).backend  # without the padding and truncation that its file may ask for
    backend.encode_special_tokens = True  # as `ShardWriter` does
    return lambda document: len(backend.encode(document.text, add_special_tokens=False)) or 1


class CountTokens(PipelineStep):  # type: ignore[misc]
    """Counts the tokens of each source, and writes them into `folder`."""

    type, name = "llama-fast", "count tokens"

    def __init__(self, tokenizer: Path, folder: Path) -> None:
        super().__init__()
        self.tokenizer, self.folder = tokenizer, folder

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        tokens_of, counted = _counting(self.tokenizer), dict[str, int]()
        for document in data:
            source = document.metadata["source"]
            counted[source] = counted.get(source, 0) + tokens_of(document)
        _write(counted, self.folder, rank)


def _write(counted: Mapping[str, int], folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    step = Step("mixture", "count", counts=[Count(source, times) for source, times in sorted(counted.items())])
    write_json(folder / f"{rank:05d}.json", step)


def tokens_of_sources(folder: Path) -> dict[str, int]:
    """What all tasks have written."""
    total: dict[str, int] = {}
    for file in sorted(folder.glob("*.json")):
        for count in read_json(file, Step).counts:
            total[count.what] = total.get(count.what, 0) + count.times
    return total


def epochs(tokens: Mapping[str, int], weights: Mapping[str, float], max_epochs: float) -> dict[str, float]:
    """How often each token of a source comes, so that they are as the weights and no source comes more than `max_epochs` times.

    Raises:
        ValueError: nothing is left of a source.
    """
    if empty := [name for name in weights if not tokens.get(name)]:
        raise ValueError(f"source {empty[0]!r} has a weight and no text is left of it: the report says why")
    total = min(max_epochs * tokens[name] / weight for name, weight in weights.items())
    return {
        name: round(total * weight / tokens[name], 9) for name, weight in weights.items()
    }  # 1, not 1.0000000000000002


class Mix(PipelineStep):  # type: ignore[misc]
    """Repeats or leaves out documents by source, evenly over each task: two of five of a source that comes 0.4 times.

    A document comes once more when its source is owed as many tokens as it has, so that a task has at most the tokens of a document too
    many or too few, however long its documents are. Where that begins is decided by seed, source and task, or a source that is thin in
    every task would come in none. What has come is written into `used`, as `CountTokens` does.
    """

    type, name = "llama-fast", "mixture"

    def __init__(self, times: Mapping[str, float], seed: int, tokenizer: Path, used: Path, records: Path) -> None:
        super().__init__()
        self.times, self.seed, self.tokenizer, self.used, self.records = dict(times), seed, tokenizer, used, records

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally, used = Tally("tokenize", self.name), dict.fromkeys(self.times, 0)
        yield from tally.going(self._mixed(tally.coming(data), tally, used, rank))
        tally.write(self.records, 1, rank)
        _write(used, self.used, rank)

    def _mixed(
        self, documents: Iterator[Document], tally: Tally, used: dict[str, int], rank: int
    ) -> Iterator[Document]:
        tokens_of, owed = _counting(self.tokenizer), dict[str, float]()
        for document in documents:
            source, tokens = document.metadata["source"], tokens_of(document)
            copies, part = divmod(self.times[source], 1)
            if part:
                owed[source] = owed.get(source, tokens * self._begins(source, rank)) + part * tokens
                if owed[source] >= tokens:
                    owed[source] -= tokens
                    copies += 1
            if not copies:
                tally.remove(document, f"{source} has more than its share")
            for _ in range(int(copies)):
                used[source] += tokens
                yield document

    def _begins(self, source: str, rank: int) -> float:
        return xxhash.xxh3_64_intdigest(f"{self.seed}:{source}:{rank}".encode()) / 2**64
