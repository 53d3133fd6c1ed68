"""Scores of texts. A metric gives each example statistics; a score is a figure made of their sums over all examples.

So a score of a corpus is right on every resample of it (`bootstrap`), and two files can be compared by what they hold.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

from .extra import needed_extra
from .rouge import rouge
from .words import apart, is_punctuation

Statistics = list[list[float]]

NAMES = ("bleu", "chrf", "rouge", "exact_match", "f1", "accuracy")
"""Of metrics of outputs; "bleu:zh" names the tokenizer of BLEU, "13a" by default."""

FROM_HARNESS = "lm-eval:"
"""What the names of lm-eval's metrics begin with: its bleu is none of ours."""

_NEEDS_DOWNLOAD = ("spm", "flores101", "flores200", "spBLEU-1K")


@dataclass(frozen=True)
class Figure:
    """A score: its name, and what it is of the sums of its metric's statistics and the number of examples."""

    name: str
    of: Callable[[Sequence[float], int], float]
    unit: str = "share"
    lower_is_better: bool = False
    of_one: Callable[[Sequence[float], int], float] | None = None
    """What it is of one example alone, where that is something else."""

    def alone(self, statistics: Sequence[float]) -> float:
        """Of one example."""
        return (self.of_one or self.of)(statistics, 1)


def figures(metric: str) -> list[Figure]:
    """The scores that are made of a metric's statistics."""
    if metric.startswith(FROM_HARNESS):
        name = metric.removeprefix(FROM_HARNESS)
        return [Figure(name, _OF_HARNESS.get(name.partition(",")[0], _mean(0)), "")]
    return _FIGURES[metric.partition(":")[0]]


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name of no metric, and for a tokenizer that needs what is not there."""
    for name in names:
        family, _, tokenizer = name.partition(":")
        if family not in NAMES or (tokenizer and family != "bleu"):
            raise ValueError(f"scores must be of {', '.join(NAMES)} (and bleu:zh, bleu:char, ...), got {name!r}")
        if tokenizer:
            _bleu(tokenizer)


def measure(metric: str, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Statistics, str]:
    """The statistics of each output, and the metric's signature ("" where it has none).

    Raises:
        ValueError: there is no such metric; `accuracy` is a task's own checker's.
        ImportError: its package is not installed.
    """
    family, _, tokenizer = metric.partition(":")
    if family in ("bleu", "chrf"):
        return _by_sacrebleu(_bleu(tokenizer or "13a") if family == "bleu" else _chrf(), outputs, references)
    one = {"rouge": rouge, "exact_match": exact_match, "f1": f1}[family]
    return [one(output, list(right)) for output, right in zip(outputs, references, strict=True)], ""


# --- BLEU and chrF ---------------------------------------------------------------------------------------------------


def _by_sacrebleu(metric: Any, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Statistics, str]:
    """sacrebleu's own statistics, as its own bootstrap sums them."""
    streams = [list(stream) for stream in zip_longest(*references)]  # None where an example has fewer references
    statistics = metric._extract_corpus_statistics(list(outputs), streams)
    return [[float(x) for x in each] for each in statistics], str(metric.get_signature())


@cache
def _bleu(tokenizer: str = "13a") -> Any:
    with needed_extra():
        from sacrebleu.metrics.bleu import BLEU
    if tokenizer not in BLEU.TOKENIZERS:
        raise ValueError(f"bleu:{tokenizer}: sacrebleu knows the tokenizers {', '.join(sorted(BLEU.TOKENIZERS))}")
    try:
        return BLEU(tokenize=tokenizer)
    except Exception as error:  # whatever its tokenizer raises where something is missing
        why = str(error).strip().splitlines()[-1].strip()
        if tokenizer in _NEEDS_DOWNLOAD:
            why = f"sacrebleu downloads a model for it (and needs sentencepiece): {why}"
        raise ValueError(f"bleu:{tokenizer} cannot be computed here: {why}; bleu:char needs nothing") from None


@cache
def _chrf() -> Any:
    with needed_extra():
        from sacrebleu.metrics.chrf import CHRF
    return CHRF(word_order=2)  # chrF++


# --- answers ---------------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """SQuAD's rules: lower case, no punctuation, no articles, single spaces. Punctuation is that of all scripts."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation and not is_punctuation(char))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(output: str, references: Sequence[str]) -> list[float]:
    answer = normalize_answer(output)
    return [float(any(answer == normalize_answer(right) for right in references))]


def f1(output: str, references: Sequence[str]) -> list[float]:
    """The best overlap of tokens with a reference; each Chinese character and kana is a token."""
    return [max(_overlap(_answer_tokens(output), _answer_tokens(right)) for right in references)]


def _answer_tokens(text: str) -> list[str]:
    return apart(normalize_answer(text)).split()


def _overlap(output: list[str], right: list[str]) -> float:
    if not output or not right:
        return float(output == right)
    common = sum((Counter(output) & Counter(right)).values())
    return 2 * common / (len(output) + len(right))


# --- figures ---------------------------------------------------------------------------------------------------------


def _mean(index: int) -> Callable[[Sequence[float], int], float]:
    return lambda sums, examples: sums[index] / examples


@cache
def _sentence_bleu() -> Any:
    """Of an output of less than four words the n-grams that it has none of do not count: or one that is right would score 0."""
    with needed_extra():
        from sacrebleu.metrics.bleu import BLEU
    return BLEU(effective_order=True)


def _score_of(metric: Callable[[], Any]) -> Callable[[Sequence[float], int], float]:
    return lambda sums, _: float(metric()._compute_score_from_stats([round(x) for x in sums]).score)


# the statistics of perplexity are nats, tokens, bytes; a passage inside one long token has none of its own
_FIGURES = {
    "perplexity": [
        Figure("bits per byte", lambda sums, _: sums[0] / math.log(2) / sums[2], "bits/byte", True),
        Figure("nats per token", lambda sums, _: sums[0] / max(sums[1], 1), "nats/token", True),
        Figure("perplexity", lambda sums, _: math.exp(sums[0] / max(sums[1], 1)), "", True),
    ],
    "bleu": [Figure("BLEU", _score_of(_bleu), "", of_one=_score_of(_sentence_bleu))],
    "chrf": [Figure("chrF++", _score_of(_chrf), "")],
    "rouge": [Figure(f"ROUGE-{kind}", _mean(i)) for i, kind in enumerate(("1", "2", "L", "Lsum"))],
    "exact_match": [Figure("exact match", _mean(0))],
    "f1": [Figure("token F1", _mean(0))],
    "accuracy": [Figure("accuracy", _mean(0))],
}

# of lm-eval's metrics, those of log-likelihoods and lengths; the others are means
_OF_HARNESS = {
    "bits_per_byte": lambda sums, _: -sums[0] / sums[1] / math.log(2),
    "byte_perplexity": lambda sums, _: math.exp(-sums[0] / sums[1]),
    "word_perplexity": lambda sums, _: math.exp(-sums[0] / sums[1]),
}
