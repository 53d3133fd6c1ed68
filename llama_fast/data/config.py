"""What `llama-fast data` is told: one TOML file. Every table and key is a field here, with its default."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Format = Literal["auto", "text", "markdown", "html", "jsonl", "csv", "parquet", "arrow"]
Mask = Literal["email", "phone", "card"]


def _require(is_right: bool, name: str, expected: str, value: Any) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {expected}, and is {value!r}")


@dataclass(frozen=True)
class Source:
    """Where text comes from: a `path`, or a `collection` that has a name."""

    name: str
    path: str | None = None
    """A file, a folder, a glob, `hf://datasets/owner/name`, or any other address that fsspec opens."""
    collection: str | None = None
    """Text by name, as `llama-fast data collect --source NAME` fetches it into the cache."""
    format: Format = "auto"
    """"auto" goes by the end of each file's name and leaves files alone that it does not know."""
    split: Literal["file", "paragraph"] = "file"
    """What one document of a text file is: all of it, or what stands between blank lines."""
    text: str = "text"
    """The field of a JSON line, the column of a table, that holds the text."""
    encoding: str = "utf-8"
    language: str | None = None
    """The language the source is known to be in, as "en". A detector, where one is asked for, goes before it."""
    hold_out: tuple[str, ...] = ()
    """Files that no training may see, as patterns of their names: cleaned, and kept in a folder of their own."""
    weight: float | None = None
    """This source's share of the tokens, relative to the other sources' weights: 1 beside one that has a weight. If none has, all is taken."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.collection is None):
            raise ValueError(f"source {self.name!r} needs either a path or a collection")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(
                f"weight must be a number above 0, and is {self.weight}; to use nothing of a source, leave it out"
            )


@dataclass(frozen=True)
class Clean:
    """Changes of text, in this order. Of documents only pages without text are removed."""

    html: bool = True
    """Pages become their main text: by trafilatura where it is installed, else by leaving out tags, menus and scripts."""
    unicode: bool = True
    """NFC, and what was decoded with the wrong encoding is repaired (ftfy)."""
    boilerplate: bool = True
    """Lines of cookie banners, privacy notes and share buttons go."""
    repeated_lines: bool = True
    """A line that stands three times or more in a row stands once."""
    mask: tuple[Mask, ...] = ()
    """What is replaced by a word in angle brackets and counted."""


@dataclass(frozen=True)
class GopherQuality:
    """Rae et al. 2021, table A1, as datatrove has them. Words are counted without punctuation."""

    min_doc_words: int = 50
    max_doc_words: int = 100_000
    min_avg_word_length: int = 3
    max_avg_word_length: int = 10
    max_symbol_word_ratio: float = 0.1
    max_bullet_lines_ratio: float = 0.9
    max_ellipsis_lines_ratio: float = 0.3
    max_non_alpha_words_ratio: float = 0.8
    min_stop_words: int = 2
    """English documents have at least so many of "the be to of and that have with": prose has, lists of keywords have not."""


@dataclass(frozen=True)
class GopherRepetition:
    """Of the same paper: which share of a document may be repetition."""

    dup_line_frac: float = 0.3
    dup_para_frac: float = 0.3
    dup_line_char_frac: float = 0.2
    dup_para_char_frac: float = 0.2
    n_grams: bool = True
    """Also by n-grams of 2 to 10 words, of documents in scripts that separate words."""


@dataclass(frozen=True)
class Filters:
    """Which documents stay. Each filter that is off costs nothing."""

    min_chars: int = 1
    max_chars: int = 10_000_000
    languages: tuple[str, ...] = ()
    """Two-letter codes that stay, found by lingua, which `pip install "llama-fast[web]"` brings. All by default."""
    min_language_confidence: float = 0.5
    quality: bool = True
    repetition: bool = True
    c4: bool = False
    """C4's rules for lines of web pages, which also lose every line of verse: off unless asked for."""
    stop_words: bool = False
    """Removes function words from the text itself. See `steps.filters.without_stop_words` before turning it on."""
    gopher_quality: GopherQuality = GopherQuality()
    gopher_repetition: GopherRepetition = GopherRepetition()

    def __post_init__(self) -> None:
        _require(self.min_chars <= self.max_chars, "min_chars", f"at most max_chars, {self.max_chars}", self.min_chars)
        confidence = self.min_language_confidence
        _require(0 <= confidence <= 1, "min_language_confidence", "from 0 to 1", confidence)


@dataclass(frozen=True)
class EvaluationSet:
    """Text that models will be judged by."""

    name: str
    path: str
    format: Format = "auto"
    text: str = "text"


@dataclass(frozen=True)
class Decontaminate:
    """Documents that share `ngram` words in a row with an evaluation set are removed."""

    against: tuple[EvaluationSet, ...] = ()
    held_out: bool = True
    """What sources hold out counts as an evaluation set too."""
    ngram: int = 13

    def __post_init__(self) -> None:
        _require(self.ngram >= 1, "ngram", "at least 1", self.ngram)
        names = [each.name for each in self.against]
        for name in names:  # it is that of a file, and of a reason for removing
            _require(name not in ("", ".", "..") and "/" not in name, "against: a name", "one of a file", name)
            _require(names.count(name) == 1, "against: a name", "of one evaluation set alone", name)


@dataclass(frozen=True)
class Dedup:
    """Doubles: exact ones by a hash of the text in lower case without marks and space, near ones by MinHash."""

    exact: bool = True
    minhash: bool = True
    ngram: int = 5
    """Words in a shingle; in Chinese and Japanese each letter is a word."""
    buckets: int = 14
    hashes: int = 8
    """Per bucket. Two documents with a share s of shingles in common are found with probability 1-(1-s^hashes)^buckets."""

    def __post_init__(self) -> None:
        for name in ("ngram", "buckets", "hashes"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE to train on what is left, or an existing tokenizer."""

    path: str | None = None
    """A folder with a tokenizer.json: it is taken as it is, and nothing is trained."""
    vocab_size: int = 4096
    special_tokens: tuple[str, ...] = ()
    """Beside those of beginning and end."""
    chat_template: str | None = None
    """A file with a Jinja template, kept with the tokenizer that is trained."""

    def __post_init__(self) -> None:
        if self.path is not None and self.chat_template is not None:
            raise ValueError("a tokenizer with a path brings its own chat_template: leave one of the two out")


@dataclass(frozen=True)
class Mixture:
    """How sources with weights are mixed."""

    max_epochs: float = 1.0
    """How often a document may come at most. 1: nothing is repeated, and the source that is shortest for its weight decides."""

    def __post_init__(self) -> None:
        _require(0 < self.max_epochs < math.inf, "max_epochs", "a number above 0", self.max_epochs)


@dataclass(frozen=True)
class Executor:
    """Which of datatrove's executors runs the steps."""

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int = 0
    """Processes at a time; 0 is the number of CPUs."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Arguments of datatrove's SlurmPipelineExecutor: time, partition, cpus_per_task, ..."""
    ray: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.workers >= 0, "workers", "at least 1, or 0 for the number of CPUs", self.workers)


@dataclass(frozen=True)
class Config:
    """All of it. Paths are seen from the folder where the command runs."""

    out: str
    sources: tuple[Source, ...]
    tasks: int = 8
    """Parts that the work is divided into. What is written depends on them, not on the number of processes."""
    seed: int = 0
    clean: Clean = Clean()
    filters: Filters = Filters()
    decontaminate: Decontaminate = Decontaminate()
    dedup: Dedup = Dedup()
    tokenizer: Tokenizer = Tokenizer()
    mixture: Mixture = Mixture()
    executor: Executor = field(default_factory=Executor)

    @property
    def weights(self) -> dict[str, float]:
        """Of all sources, if any has one; else of none."""
        if all(source.weight is None for source in self.sources):
            return {}
        return {source.name: 1.0 if source.weight is None else source.weight for source in self.sources}

    def __post_init__(self) -> None:
        _require(bool(self.out.strip()), "out", "a folder", self.out)
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources is empty: name at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have one name: {', '.join(sorted(names))}")
        _require(1 <= self.tasks < 100_000, "tasks", "1 to 99,999", self.tasks)
