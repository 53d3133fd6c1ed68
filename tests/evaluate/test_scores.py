"""Scores are those of sacrebleu, of rouge-score and of SQuAD's rules, in Chinese and Japanese too."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenizers
from sacrebleu.metrics import BLEU, CHRF

from llama_fast.evaluate import scores
from llama_fast.evaluate.rouge import TYPES, rouge
from llama_fast.evaluate.words import words
from tests.parity import not_interpreted

pytestmark = not_interpreted

OUTPUTS = ["The cat sat on the mat.", "A dog, they said, ran away!", "", "It rained for six days", "我们去公园玩。"]
REFERENCES = [
    ["The cat sat on a mat.", "A cat was sitting on the mat."], ["The dog ran away."], ["Nothing was said."],
    ["It rained for six days", "Rain fell."], ["我们昨天去公园玩了。"],
]  # fmt: skip
STREAMS = [[each[0] for each in REFERENCES], [each[1] if len(each) > 1 else None for each in REFERENCES]]


def total(metric: str, outputs, references) -> dict[str, float]:
    statistics, _ = scores.measure(metric, outputs, references)
    sums = [sum(column) for column in zip(*statistics, strict=True)]
    return {figure.name: figure.of(sums, len(outputs)) for figure in scores.figures(metric)}


@pytest.mark.parametrize(
    ("metric", "peer"),
    [
        ("bleu", BLEU()), ("bleu:zh", BLEU(tokenize="zh")), ("bleu:char", BLEU(tokenize="char")), ("chrf", CHRF(word_order=2)),
    ],
)  # fmt: skip
def test_bleu_and_chrf_are_those_of_sacrebleu_with_its_signature(metric, peer):
    (value,) = total(metric, OUTPUTS, REFERENCES).values()
    assert value == pytest.approx(peer.corpus_score(OUTPUTS, STREAMS).score, rel=1e-12)
    assert 5 < value < 90
    assert scores.measure(metric, OUTPUTS, REFERENCES)[1] == str(peer.get_signature())


def test_the_score_of_an_example_alone_is_that_of_a_corpus_of_one():
    for output, references in zip(OUTPUTS, REFERENCES, strict=True):
        (value,) = total("chrf", [output], [references]).values()
        assert value == pytest.approx(CHRF(word_order=2).corpus_score([output], [[r] for r in references]).score)


@given(st.text(st.characters(max_codepoint=127)))
def test_words_are_those_of_rouge_score_on_ascii(text):
    assert words(text) == tokenizers.DefaultTokenizer().tokenize(text)


ASCII = st.lists(st.sampled_from(["a", "cat", "the", "Sat", "mat.", "on,", "\n", "x1"]), max_size=12).map(" ".join)


@given(ASCII, st.lists(ASCII, min_size=1, max_size=3))
def test_rouge_is_that_of_rouge_score_on_ascii(output, references):
    peer = rouge_scorer.RougeScorer(TYPES).score_multi(references, output)
    assert rouge(output, references) == [peer[kind].fmeasure for kind in TYPES]


@pytest.mark.parametrize(
    ("output", "reference", "one", "lcs"),
    [
        ("我们去公园", "我们昨天去公园", 2 * 5 / 12, 2 * 5 / 12),
        ("公园去我们", "我们去公园", 1, 2 / 5),  # the same characters, and two of them in order
        ("吾輩は猫である", "吾輩は犬である", 6 / 7, 6 / 7),
        ("カメラをー", "ｶﾒﾗをー", 1, 1),
        ("Ａ１ café", "a1 CAFÉ", 1, 1),
        ("naïve cafe", "naive café", 0, 0),
    ],
)  # fmt: skip
def test_rouge_knows_other_scripts(output, reference, one, lcs):
    found = dict(zip(TYPES, rouge(output, [reference]), strict=True))
    assert (found["rouge1"], found["rougeL"]) == pytest.approx((one, lcs))
    if not output.isascii() and one and not any(c.isascii() and c.isalnum() for c in output):
        assert rouge_scorer.RougeScorer(["rouge1"]).score(reference, output)["rouge1"].fmeasure == 0


def test_a_newline_ends_a_sentence_of_lsum():
    apart = dict(zip(TYPES, rouge("the dog ran\nthe cat sat", ["the cat sat\nthe dog ran"]), strict=True))
    assert apart["rougeLsum"] == 1 and apart["rougeL"] < 1


@pytest.mark.parametrize(
    ("text", "words_of_it"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]), ("한국어 문장", ["한국어", "문장"]), ("Straße_x", ["straße", "x"]),
        ("中文和English混合", ["中", "文", "和", "english", "混", "合"]), ("人々、・「山」", ["人", "々", "山"]), ("", []),
    ],
)  # fmt: skip
def test_words_of_other_scripts(text, words_of_it):
    assert words(text) == words_of_it


@pytest.mark.parametrize(
    ("output", "references", "exact", "overlap"),
    [
        ("The Eiffel Tower.", ["Eiffel tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 0.5),
        ("a", ["the"], 1, 1),  # nothing is left of either
        ("a", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("Paris Paris", ["Paris"], 0, 2 / 3),
        ("Paris Paris", ["Paris, Paris!"], 1, 1),
        ("another theory", ["other theory"], 0, 0.5),  # articles are words
        ("$5.0", ["50"], 1, 1),
        ("wrong", ["Paris", "wrong"], 1, 1),
        ("北京市。", ["北京市"], 1, 1),
        ("在北京", ["北京"], 0, 0.8),
        ("東京です", ["東京"], 0, 2 / 3),
    ],
)  # fmt: skip
def test_answers_are_judged_by_squads_rules(output, references, exact, overlap):
    assert scores.exact_match(output, references) == [exact]
    assert scores.f1(output, references) == [pytest.approx(overlap)]


def test_rouge_and_answers_are_means_over_examples():
    assert total("exact_match", ["a b", "c"], [["a b"], ["d"]]) == {"exact match": 0.5}
    assert total("rouge", ["x y", "x"], [["x y"], ["z"]])["ROUGE-1"] == 0.5


@pytest.mark.parametrize("name", ["blue", "chrf:zh", "rouge1", "perplexity", ""])
def test_an_unknown_score_is_named(name):
    with pytest.raises(ValueError, match=f"must be of bleu, chrf, .*got '{name}'"):
        scores.check_names([name])


def test_an_unknown_tokenizer_of_bleu_is_named():
    with pytest.raises(ValueError, match="bleu:klingon: sacrebleu knows the tokenizers 13a, char"):
        scores.check_names(["bleu:klingon"])


def test_a_tokenizer_that_needs_an_extra_says_which(monkeypatch):
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    with pytest.raises(
        ValueError, match=r"bleu:ja-mecab cannot be computed here: pip install sacrebleu\[ja\]; bleu:char"
    ):
        scores.check_names(["bleu:ja-mecab"])


def test_a_tokenizer_that_needs_a_download_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="bleu:flores200 cannot be computed here: sacrebleu downloads a model for it"):
        scores.check_names(["bleu:flores200"])


@pytest.mark.parametrize(("package", "metric"), [("sacrebleu", "chrf"), ("rouge_score", "rouge")])
def test_a_missing_package_says_how_to_install_it(monkeypatch, package, metric):
    from llama_fast.evaluate.rouge import _scorer

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for cached in (_scorer, scores._chrf):
        cached.cache_clear()
    with pytest.raises(ImportError, match=rf'{package}.* is not installed: pip install "llama-fast\[eval\]"'):
        scores.measure(metric, ["a"], [["a"]])
