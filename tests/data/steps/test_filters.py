"""Which documents stay, and the reason each other one is given."""

import pydoc_data.topics
from collections import Counter
from importlib.util import find_spec

import pytest

from llama_fast.data.bpe import BpeConfig, train_tokenizer
from llama_fast.data.config import Filters, GopherQuality, GopherRepetition
from llama_fast.data.documents import Document, Removed
from llama_fast.data.steps import filters
from llama_fast.data.steps.decontaminate import decontamination, write_index
from llama_fast.data.steps.mixture import Mix, epochs, tokens_of_sources

PROSE = (
    "The river rises in the hills and goes to the sea, which is a day away on foot. People have lived with it for a long time: "
    "they fish, they mill their corn, and they tell of the year when the water came over the bridge. A boat that was tied up at "
    "the old quay was found in a field the morning after. Nobody had seen it go, and its owner asked for no money to be paid. The bridge stands."
)
CHINESE = "这条河发源于山中，流向大海，步行需要一天。人们长期与它为伴：他们捕鱼，磨谷物，并讲述洪水漫过桥梁的那一年。一条系在旧码头的小船，第二天早晨在田野里被发现。没有人看见它离开，船主也没有要求赔偿。"
JAPANESE = "川は山に源を発し、海へと流れている。海までは歩いて一日かかる。人々は長い間この川とともに暮らしてきた。魚をとり、粉をひき、水が橋をこえた年のことを語りつぐ。古い岸につながれていた舟が、次の朝、畑で見つかった。だれも舟が流れるのを見ていなかった。"


def verdict(function, text, **metadata):
    result = function(Document(text, "d", metadata=metadata))
    return result.reason if isinstance(result, Removed) else None


quality = filters.gopher_quality(GopherQuality())
repetition = filters.gopher_repetition(GopherRepetition())


@pytest.mark.parametrize("text", [PROSE, CHINESE, JAPANESE])
@pytest.mark.parametrize("function", [quality, repetition, filters.c4_quality()])
def test_prose_stays_in_every_script(function, text):
    assert verdict(function, text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short to learn from.", "short doc"),
        ("# " * 100 + PROSE, "too many hashes"),
        ("antidisestablishmentarianism " * 60, "above avg threshold"),
        ("a b c d e " * 20, "below avg threshold"),
        ("12345 67890 " * 60 + PROSE, "below alpha threshold"),
        ("\n".join(f"- point number {i} of some list" for i in range(30)), "too many bullets"),
        (
            "\n".join(f"however the river rises again and those who have seen it go home {i}..." for i in range(20)),
            "too many end ellipsis",
        ),
        ("这" * 20, "short doc"),
    ],
)
def test_quality_names_its_reason(text, reason):
    assert verdict(quality, text) == reason


def test_two_stop_words_are_asked_of_english_alone():
    keywords = " ".join(f"cheap shoes brand{i} leather sale discount outlet" for i in range(12))
    assert verdict(quality, keywords, language="en") == "enough stop words"
    assert verdict(quality, keywords) is None and verdict(quality, keywords, language="de") is None
    assert verdict(quality, PROSE, language="en") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ((PROSE + "\n\n") * 3, "dup para frac"),
        ("\n".join(["the same line again"] * 8 + ["another"]), "dup line frac"),
        (" ".join(["buy now"] * 60), "top 2 gram"),
        ((CHINESE + "\n\n") * 3, "dup para frac"),
    ],
)
def test_repetition_names_its_reason(text, reason):
    assert verdict(repetition, text) == reason


def test_c4_keeps_lines_that_end_as_sentences():
    document = Document(
        f"Menu\n{PROSE}\nHome | About\nOne more sentence that is kept here.\nlast words of no sentence", "d"
    )
    assert filters.c4_quality()(document).text == f"{PROSE}\nOne more sentence that is kept here."
    assert verdict(filters.c4_quality(), PROSE + " lorem ipsum.") == "lorem ipsum"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), (" \n ", "empty"), ("abcd", "below 5 characters"), ("a" * 11, "above 10 characters")],
)
def test_length_names_its_reason(text, reason):
    assert verdict(filters.length(Filters(min_chars=5, max_chars=10)), text) == reason
    assert verdict(filters.length(Filters(min_chars=5, max_chars=10)), "abcde") is None


@pytest.mark.skipif(not find_spec("lingua"), reason="lingua is not installed")
def test_language():
    english = filters.language(("en", "zh"), 0.3)
    assert verdict(english, PROSE) is None and verdict(english, CHINESE) is None
    assert verdict(english, JAPANESE) == "language ja"
    assert verdict(english, "1234 5678") == "language unclear"
    with pytest.raises(ValueError, match="lingua knows no xx"):
        filters.language(("en", "xx"), 0.3)


def test_language_says_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(filters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lingua, which is not installed: pip install \"llama-fast\[web\]\""):
        filters.language(("en",), 0.5)


def test_stop_words_are_removed_only_when_asked_for():
    names = [name for name, _ in filters.steps(Filters())]
    assert "stop words" not in names and "quality (C4)" not in names
    document = filters.without_stop_words(Document("The dog and\nthe man, who was not his.", "d"))
    assert document.text == "dog\nman, who his.".replace(" his.", "")
    assert [name for name, _ in filters.steps(Filters(quality=False, repetition=False, stop_words=True))] == [
        "length", "stop words",
    ]  # fmt: skip


def test_the_manual_is_prose():
    """Of the 465 kB that every Python brings, most stays: a filter that removes good text is seen here."""
    texts = [text for text in pydoc_data.topics.topics.values() if len(text) > 2000]
    stay = [text for text in texts if verdict(quality, text) is None and verdict(repetition, text) is None]
    assert len(stay) > 0.9 * len(texts)


def test_documents_that_share_long_n_grams_with_an_evaluation_set_go(tmp_path):
    write_index(tmp_path, "exam", [PROSE], ngram=13)
    write_index(tmp_path, "中文", [CHINESE], ngram=13)
    words = PROSE.split()
    clean = decontamination(tmp_path, ngram=13)
    assert verdict(clean, "Before it. " + " ".join(words[20:33]).upper() + "! After it.") == "shares 13 words with exam"
    assert verdict(clean, "Before it. " + " ".join(words[20:32]) + " otherwise") is None
    assert verdict(clean, "他说：" + CHINESE[30:60]) == "shares 13 words with 中文"
    assert verdict(clean, JAPANESE) is None


def test_an_evaluation_set_that_would_find_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no text of exam has 13 words.*set decontaminate\.ngram lower"):
        write_index(tmp_path, "exam", ["Who wrote it?", "Where is Rome?"], ngram=13)


def test_epochs_give_each_source_its_share():
    tokens = {"a": 1000, "b": 100}
    times = epochs(tokens, {"a": 1.0, "b": 1.0}, 1.0)
    assert times == {"a": 0.1, "b": 1.0}
    assert epochs(tokens, {"a": 1.0, "b": 1.0}, 3.0) == pytest.approx({"a": 0.3, "b": 3.0})
    assert epochs(tokens, {"a": 10.0, "b": 1.0}, 1.0) == {"a": 1.0, "b": 1.0}
    with pytest.raises(ValueError, match="'b' has a weight and no text is left of it"):
        epochs({"a": 10}, {"a": 1.0, "b": 1.0}, 1.0)


@pytest.mark.parametrize(("times", "expected"), [(1.0, 1.0), (2.0, 2.0), (0.3, 0.3), (1.25, 1.25)])
def test_a_mixture_counts_tokens_whatever_the_order_of_lengths(tmp_path, times, expected):
    """Long documents first: by documents, those of the first tasks would count for more."""
    train_tokenizer(["some words of a text"], tmp_path / "tokenizer", BpeConfig(vocab_size=262))
    mix = Mix({"s": times}, 0, tmp_path / "tokenizer", tmp_path / "used", tmp_path)
    documents = [Document("x" * (1000 - i), str(i), metadata={"source": "s"}) for i in range(999)]
    mixed = list(mix.run(documents))
    assert sum(len(document.text) for document in mixed) == tokens_of_sources(tmp_path / "used")["s"]
    assert tokens_of_sources(tmp_path / "used")["s"] == pytest.approx(expected * 500_499, abs=1000)
    copies = Counter(document.id for document in mixed)
    assert set(copies.values()) <= {int(times), int(times) + 1} and (times < 1 or len(copies) == 999)
