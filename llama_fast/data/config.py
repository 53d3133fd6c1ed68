"""What `llama-fast data` is told: one TOML file. Every table and key is a field here, with its default."""

from dataclasses import dataclass, field
from typing import Any, Literal

Format = Literal["auto", "text", "markdown", "html", "jsonl", "csv", "parquet", "arrow"]
Mask = Literal["email", "phone", "card"]


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
    weight: float = 1.0
    """This source's share of the tokens, relative to the other sources' weights. Used if any source has one."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.collection is None):
            raise ValueError(f"source {self.name!r} needs either a path or a collection")
        if not self.weight > 0:
            raise ValueError(f"weight must be above 0, and is {self.weight}; leave the source out instead")


@dataclass(frozen=True)
class Clean:
    """Changes of text that remove no document, in this order."""

    unicode: bool = True
    """NFC, and what was decoded with the wrong encoding is repaired (ftfy)."""
    html: bool = True
    """Pages become their main text: by trafilatura where it is installed, else by leaving out tags, menus and scripts."""
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


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE to train on what is left, or an existing tokenizer."""

    path: str | None = None
    """A folder with a tokenizer.json: it is taken as it is, and nothing is trained."""
    vocab_size: int = 4096
    special_tokens: tuple[str, ...] = ()
    """Beside those of beginning and end."""
    chat_template: str | None = None
    """A file with a Jinja template, kept with the tokenizer."""


@dataclass(frozen=True)
class Mixture:
    """How sources with weights are mixed."""

    max_epochs: float = 1.0
    """How often a document may come at most. 1: nothing is repeated, and the source that is shortest for its weight decides."""


@dataclass(frozen=True)
class Executor:
    """Which of datatrove's executors runs the steps."""

    kind: Literal["local", "slurm", "ray"] = "local"
    workers: int = 0
    """Processes at a time; 0 is the number of CPUs."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Arguments of datatrove's SlurmPipelineExecutor: time, partition, cpus_per_task, ..."""
    ray: dict[str, Any] = field(default_factory=dict)


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

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources is empty: name at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have one name: {', '.join(sorted(names))}")
        if not 1 <= self.tasks < 100_000:
            raise ValueError(f"tasks must be 1 to 99,999, and is {self.tasks}")
