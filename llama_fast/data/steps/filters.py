"""Which documents stay: length, language, and the rules of Gopher and C4 as datatrove has them."""

from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result

from ..config import Filters, GopherQuality, GopherRepetition
from ..documents import Document, Function, Removed
from .words import WORDS, separates_words

_ENGLISH = """
a an the and or but nor so yet if of to in on at by for from with as into over under about than then that this these those it its he
him his she her they them their we us our you your i me my is am are was were be been being do does did have has had will would
shall should can could may might must not no
"""  # articles, prepositions, conjunctions, pronouns, auxiliaries
FUNCTION_WORDS = frozenset(_ENGLISH.split())


def length(limits: Filters) -> Function:
    """Documents of `min_chars` to `max_chars` characters stay."""

    def by_length(document: Document) -> Document | Removed:
        if not document.text.strip():
            return Removed("empty")
        if len(document.text) < limits.min_chars:
            return Removed(f"below {limits.min_chars:,} characters")
        return Removed(f"above {limits.max_chars:,} characters") if len(document.text) > limits.max_chars else document

    return by_length


def language(wanted: tuple[str, ...], confidence: float) -> Function:
    """Documents in one of these languages (two-letter codes) stay, found by lingua in their first 1,000 characters.

    datatrove's own filter downloads a model when it runs; lingua brings its models.

    Raises:
        ValueError: lingua is not installed, or knows no such language.
    """
    if not find_spec("lingua"):
        raise ValueError('filters.languages needs lingua, which is not installed: pip install "llama-fast[web]"')
    import lingua

    codes = {each.iso_code_639_1.name.lower() for each in lingua.Language.all()}
    if unknown := sorted(set(wanted) - codes):
        raise ValueError(
            f"filters.languages: lingua knows no {', '.join(unknown)}; two-letter codes: {' '.join(sorted(codes))}"
        )
    # low accuracy: bigger n-grams help below 120 characters only, and cost 1 GB
    detector = lingua.LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    def by_language(document: Document) -> Document | Removed:
        found = detector.compute_language_confidence_values(document.text[:1000])
        best = found[0] if found else None
        if best is None or best.value < confidence:
            return Removed("language unclear")
        code = best.language.iso_code_639_1.name.lower()
        document.metadata["language"] = code
        return document if code in wanted else Removed(f"language {code}")

    return by_language


def gopher_quality(rules: GopherQuality) -> Function:
    """Gopher's rules of quality. What they say of words holds where spaces separate them; stop words are judged in English.

    A document is English if a detector or its source says so.
    """
    english = _function(GopherQualityFilter(language=WORDS, **asdict(rules)))
    other = _function(GopherQualityFilter(language=WORDS, **asdict(rules) | {"min_stop_words": 0}))
    unspaced = _function(
        GopherQualityFilter(
            language=WORDS,
            **asdict(rules) | {"min_stop_words": 0, "min_avg_word_length": None, "max_avg_word_length": None},
        )
    )

    def by_quality(document: Document) -> Document | Removed:
        if not separates_words(document.text):
            return unspaced(document)
        return (english if document.metadata.get("language") == "en" else other)(document)

    return by_quality


def gopher_repetition(rules: GopherRepetition) -> Function:
    """Gopher's rules of repetition: lines, paragraphs, and n-grams of words, which letters of Chinese are not."""
    lines: dict[str, Any] = {key: share for key, share in asdict(rules).items() if key != "n_grams"}
    spaced = GopherRepetitionFilter(language=WORDS, **lines, **({} if rules.n_grams else _NO_N_GRAMS))
    unspaced = GopherRepetitionFilter(language=WORDS, **lines, **_NO_N_GRAMS)
    by_words, by_lines = _function(spaced), _function(unspaced)
    return lambda document: (by_words if separates_words(document.text) else by_lines)(document)


_NO_N_GRAMS: dict[str, Any] = {"top_n_grams": (), "dup_n_grams": ()}


def c4_quality() -> Function:
    """C4's rules for lines of web pages in scripts with spaces: only lines that end as sentences do stay."""
    rules = _function(C4QualityFilter(language=WORDS))
    return lambda document: rules(document) if separates_words(document.text) else document


def without_stop_words(document: Document) -> Document:
    """Removes English function words from the text. For bags of words, such as topics or search, never for a language model.

    A language model learns what it reads. In English a third to a half of all words are function words, and they carry the
    grammar: without them "the dog that bit the man was not his" and "the man that bit the dog was his" are the same five
    words, and the model can write neither. That a text *has* them is a sign of prose, which is why `gopher_quality` asks
    for at least two of them.
    """
    lines = document.text.split("\n")
    document.text = "\n".join(
        " ".join(word for word in line.split(" ") if word.strip(".,;:!?\"'()").lower() not in FUNCTION_WORDS)
        for line in lines
    )
    return document


def _function(block: BaseFilter) -> Function:
    """A filter of datatrove as a function. Its reasons are its own."""

    def judge(document: Document) -> Document | Removed:
        kept, reason = get_filter_result(block.filter(document))
        return document if kept else Removed((reason or block.name).removeprefix("gopher_").replace("_", " "))

    return judge


def steps(chosen: Filters) -> list[tuple[str, Callable[[], Function]]]:
    """The filters that are on, by name, in the order that costs least: cheap ones first. Each is made where it runs."""
    return [
        (name, make)
        for wanted, name, make in (
            (True, "length", lambda: length(chosen)),
            (bool(chosen.languages), "language", lambda: language(chosen.languages, chosen.min_language_confidence)),
            (chosen.quality, "quality (Gopher)", lambda: gopher_quality(chosen.gopher_quality)),
            (chosen.repetition, "repetition (Gopher)", lambda: gopher_repetition(chosen.gopher_repetition)),
            (chosen.c4, "quality (C4)", c4_quality),
            (chosen.stop_words, "stop words", lambda: without_stop_words),
        )
        if wanted
    ]
