"""ROUGE by rouge-score, with a tokenizer that knows more than ASCII: its own finds no word in Chinese, and half of one in "café"."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from .extra import needed_extra
from .words import words

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Words:
    """What rouge-score wants of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge(output: str, references: Sequence[str]) -> list[float]:
    """The F-measures of TYPES, each of the reference that has the best. A newline ends a sentence of Lsum."""
    best = _scorer().score_multi(list(references), output)
    return [float(best[kind].fmeasure) for kind in TYPES]


@cache
def _scorer() -> Any:
    with needed_extra():
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(TYPES, tokenizer=Words())  # split_summaries=True would download a model
