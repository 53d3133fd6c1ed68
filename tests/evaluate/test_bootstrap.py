"""Resamples: seeded, of whole corpora, the same examples for both sides of a pair."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from llama_fast.evaluate import bootstrap, scores
from llama_fast.evaluate.bootstrap import interval, paired_interval, resampled_sums, score_interval
from tests.parity import not_interpreted

pytestmark = not_interpreted

(MEAN,) = (figure.of for figure in scores.figures("accuracy"))
OUTPUTS = [f"the {animal} sat on the mat" for animal in ("cat", "dog", "old owl", "hen and the cat", "bull")]
REFERENCES = [[f"the {animal} sat upon a mat"] for animal in ("cat", "dog", "owl", "hen", "big bull")]


def table(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def test_the_same_seed_draws_the_same_however_many_are_drawn_at_once(monkeypatch):
    draws = lambda seed: [each.tolist() for each in resampled_sums(table(1, 2, 4, 8, 16), resamples=50, seed=seed)]  # noqa: E731
    once = draws(3)
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 7)
    assert draws(3) == once
    assert draws(4) != once


def test_each_resample_has_as_many_examples():
    assert {float(each[0]) for each in resampled_sums(table(*[1] * 9), resamples=40)} == {9.0}


def test_the_interval_of_a_share_is_about_the_normal_one():
    share, count = 0.7, 400
    low, high = score_interval(MEAN, [[1.0]] * int(share * count) + [[0.0]] * int((1 - share) * count))
    margin = 1.96 * (share * (1 - share) / count) ** 0.5
    assert (low, high) == pytest.approx((share - margin, share + margin), abs=0.2 * margin)


def test_the_interval_is_the_middle_of_the_values():
    assert interval(range(101), 0.9) == pytest.approx((5.0, 95.0))


def test_bleu_of_a_resample_is_that_of_its_corpus():
    """Not a mean of sentences': sacrebleu scores the texts that were drawn."""
    statistics, _ = scores.measure("bleu", OUTPUTS, REFERENCES)
    (figure,) = scores.figures("bleu")
    times = np.random.default_rng(0).multinomial(5, [0.2] * 5, size=10)
    drawn = [[i for i, count in enumerate(each) for _ in range(count)] for each in times]
    sums = list(resampled_sums(np.array(statistics), resamples=10, seed=0))
    for picked, each in zip(drawn, sums, strict=True):
        right = BLEU().corpus_score([OUTPUTS[i] for i in picked], [[REFERENCES[i][0] for i in picked]]).score
        assert figure.of(each.tolist(), 5) == pytest.approx(right, rel=1e-12)


def test_a_pair_draws_the_same_examples_for_both():
    """Examples differ a lot, the two sides by a little and always: paired, that is sure."""
    before = [[float(x)] for x in range(100)]
    after = [[x + 0.1 + 0.01 * (i % 3)] for i, (x,) in enumerate(before)]
    low, high = paired_interval(MEAN, before, after)
    assert 0.1 < low < high < 0.12
    assert paired_interval(MEAN, before, before) == (0.0, 0.0)
