"""Documents in simple English, written from a small grammar, and the checker that recognises them.

Four forms, each with the plain format that the tasks use:

    story         Once upon a time, there was a brave owl named Mia. ...
    question      Story: ...⏎Question: Where did Mia go?⏎Answer: She went to the lake.
    summary       Story: ...⏎Summary: At the lake, Mia the owl lost a red kite. Tom the frog helped her.
    conversation  chat messages: a request, the story, and questions about it

The writer and the checker read the same data (`story_grammar.py`), so they cannot drift apart. Some worlds, chosen by a hash
of hero, place and what the story is about, are held out: `held_out=False` never writes them and `held_out=True` writes only them.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from llama_fast.data.story_grammar import (
    BASE,
    COMMON,
    DERIVED,
    PLOTS,
    REQUESTS,
    SUM_UP,
    Facts,
    Plot,
    Slot,
    contradiction,
    derive,
)

Message = dict[str, str]
HELD_OUT_SHARE = 8  # one world in eight

_FIELD = re.compile(r"{(\w+)}")


class GrammarError(ValueError):
    """A text is not one that the grammar can write; the message says where and why."""


@dataclass(frozen=True)
class Document:
    """A text in two parts: what a model is given and what it is to write."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Story:
    """A story that was understood: its plot, the facts it tells and all that follows from them."""

    plot: Plot
    facts: Facts


# --- writing ---------------------------------------------------------------------------------------------------------


def write_story(rng: random.Random, *, held_out: bool = False) -> Document:
    """A story; the prompt ends where hero, place and subject are known."""
    plot, facts = _new_world(rng, held_out)
    sentences = [_fill(rng.choice(slot), facts) for slot in plot.slots]
    opening, rest = sentences[: plot.opening], sentences[plot.opening :]
    return Document(_join(opening), " " + _join(rest))


def write_question(rng: random.Random, *, held_out: bool = False) -> Document:
    """A story, a question about a fact it tells, and the answer."""
    text = write_story(rng, held_out=held_out).text
    question, answer = rng.choice(questions(parse_story(text)))
    return Document(f"Story: {text}\nQuestion: {question}\nAnswer:", f" {answer}")


def write_summary(rng: random.Random, *, held_out: bool = False) -> Document:
    """A story and its summary."""
    text = write_story(rng, held_out=held_out).text
    return Document(f"Story: {text}\nSummary:", f" {rng.choice(summaries(parse_story(text)))}")


def write_excerpt(rng: random.Random, *, held_out: bool = False, slots: int) -> tuple[str, list[tuple[str, str]]]:
    """A passage of `slots` slots from somewhere in a story, and every question that it answers, with the answer.

    A passage is not a story (the checker refuses it). It teaches to find a fact where there is little to search.
    """
    plot, facts = _new_world(rng, held_out)
    start = rng.randrange(len(plot.slots) - slots + 1)
    templates = [rng.choice(slot) for slot in plot.slots[start : start + slots]]
    told = {field: facts[field] for template in templates for field in _FIELD.findall(template) if field in BASE}
    return _join([_fill(template, facts) for template in templates]), questions(Story(plot, derive(told)))


def write_conversation(rng: random.Random, *, held_out: bool = False, turns: int = 3) -> list[Message]:
    """A chat: somebody asks for a story, then to sum it up or what it tells, `turns` times, never the same twice."""
    text = write_story(rng, held_out=held_out).text
    story = parse_story(text)
    said = [(_fill(rng.choice(REQUESTS), story.facts), text)]
    summing_up = (rng.choice(SUM_UP), rng.choice(summaries(story)))
    said += rng.sample([summing_up, *questions(story)], turns)
    roles = ("user", "assistant")
    return [{"role": role, "content": content} for pair in said for role, content in zip(roles, pair, strict=True)]


WRITERS: dict[str, Callable[..., Document]] = {
    "story": write_story,
    "question": write_question,
    "summary": write_summary,
}


def write_documents(form: str, count: int, *, seed: int, held_out: bool = False) -> Iterator[Document]:
    """`count` documents of one form: `"story"`, `"question"` or `"summary"`. The same seed writes the same documents."""
    rng = random.Random(f"{form} {seed}")
    return (WRITERS[form](rng, held_out=held_out) for _ in range(count))


def is_held_out(story: Story) -> bool:
    """Whether the world of a story is kept out of the training text."""
    return _is_held_out(story.plot, story.facts)


def _is_held_out(plot: Plot, facts: Facts) -> bool:
    key = " ".join(facts[field] for field in ("hero", plot.fields[0], "place"))
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def _new_world(rng: random.Random, held_out: bool) -> tuple[Plot, Facts]:
    plot = rng.choice(PLOTS)
    fixed = {
        "trouble": rng.choice(BASE["trouble"])
    }  # the rules forbid some troubles more often; keep all equally likely
    while True:
        facts = {field: fixed.get(field) or rng.choice(BASE[field]) for field in COMMON + plot.fields}
        if contradiction(facts) is None and _is_held_out(plot, facts) == held_out:
            return plot, derive(facts)


def _fill(template: str, facts: Facts) -> str:
    return _with_articles(template.format_map(facts))


def _with_articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _join(sentences: list[str]) -> str:
    return " ".join(filter(None, sentences))


def questions(story: Story) -> list[tuple[str, str]]:
    """Every question that the story answers, with the answer."""
    pairs = [pair for pair in story.plot.questions if _told("".join(pair), story.facts)]
    return [(_fill(question, story.facts), _fill(answer, story.facts)) for question, answer in pairs]


def summaries(story: Story) -> list[str]:
    """Every summary of the story that the grammar knows."""
    return [_fill(summary, story.facts) for summary in story.plot.summaries]


def _told(template: str, facts: Facts) -> bool:
    return set(_FIELD.findall(template)) <= facts.keys()


# --- checking --------------------------------------------------------------------------------------------------------


def check(text: str) -> Story:
    """The story of a document of any form, if the grammar could have written the document.

    Raises `GrammarError` when a sentence is not of the grammar, a fact changes on the way, the facts contradict each other,
    the answer is not the answer to the question, or the summary is not one of this story.
    """
    if not text.startswith("Story: "):
        return parse_story(text)
    body, mark, rest = text.removeprefix("Story: ").partition("\n")
    story = parse_story(body)
    if rest.startswith("Question: "):
        question, _, answer = rest.removeprefix("Question: ").partition("\nAnswer: ")
        check_answer(story, question, answer)
    elif rest.startswith("Summary: "):
        check_summary(story, rest.removeprefix("Summary: "))
    else:
        raise GrammarError(f"expected 'Question: ' or 'Summary: ' after the story, got {mark + rest[:60]!r}")
    return story


def check_answer(story: Story, question: str, answer: str) -> None:
    """Raises `GrammarError` unless `answer` is the answer to `question` about `story`."""
    right = dict(questions(story)).get(question)
    if right is None:
        raise GrammarError(f"the story does not answer {question!r}")
    if answer != right:
        raise GrammarError(f"{question!r} is answered by {right!r}, got {answer!r}")


def check_summary(story: Story, summary: str) -> None:
    """Raises `GrammarError` unless `summary` is one of `story`."""
    if summary not in summaries(story):
        raise GrammarError(f"the summary is one of {summaries(story)}, got {summary!r}")


def check_conversation(messages: list[Message]) -> Story:
    """The story of a chat, if it was the one asked for and every later question got its right answer."""
    said = [message["content"] for message in messages]
    pairs = list(zip(said[::2], said[1::2], strict=True))
    request, text = pairs[0]
    story = parse_story(text)
    if request not in [_fill(template, story.facts) for template in REQUESTS]:
        raise GrammarError(f"the story of {story.facts['hero']} is no answer to {request!r}")
    for question, answer in pairs[1:]:
        if question in SUM_UP:
            check_summary(story, answer)
        else:
            check_answer(story, question, answer)
    return story


def parse_story(text: str) -> Story:
    """The plot of a story and the facts it tells. Raises `GrammarError` with the first sentence that nothing explains."""
    if text != _with_articles(text) or re.search(r"\b[Aa]n (?![aeiou])", text):
        raise GrammarError(f"wrong article in {text!r}")
    plain = re.sub(r"\b([Aa])n ", r"\1 ", text)
    reader = _Reader(plain)
    for plot in PLOTS:
        facts = reader.read(plot.slots, 0, {})
        if facts is not None:
            wrong = contradiction(facts)
            if wrong:
                raise GrammarError(wrong)
            return Story(plot, derive(facts))
    raise GrammarError(reader.why)


class _Reader:
    """Reads a story slot by slot, trying every template, and remembers the farthest place where it got stuck."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.stuck_at = -1
        self.why = ""

    def read(self, slots: tuple[Slot, ...], start: int, facts: Facts) -> Facts | None:
        """The facts told from `start` on, together with those already known; None when the rest fits no choice of templates."""
        if not slots:
            if start < len(self.text):
                self._stuck(start, f"the story was over before {self.text[start : start + 60]!r}")
                return None
            return facts
        for template in slots[0]:
            told = self._read_sentence(template, start, facts)
            if told is not None:
                end, known = told
                found = self.read(slots[1:], end, known)
                if found is not None:
                    return found
        return None

    def _read_sentence(self, template: str, start: int, facts: Facts) -> tuple[int, Facts] | None:
        if not template:
            return start, facts
        match = _pattern(template).match(self.text, start)
        if match is None:
            self._stuck(start, f"expected a sentence like {template!r}, got {self.text[start : start + 60]!r}")
            return None
        told = match.groupdict()
        known = facts | {field: value for field, value in told.items() if field in BASE}
        truth = derive(known)
        for field, value in told.items():
            expected = facts.get(field) or truth[field]
            if value != expected:
                self._stuck(start + 1, f"{field} is {expected!r}, but {match.group().strip()!r} says {value!r}")
                return None
        return match.end(), known

    def _stuck(self, where: int, why: str) -> None:
        if where > self.stuck_at:
            self.stuck_at, self.why = where, why


def count_sentences(text: str) -> tuple[int, int]:
    """How many passages of `text` some template of some plot writes, whatever facts they tell, and how many it has in all."""
    text = re.sub(r"\b([Aa])n ", r"\1 ", text)
    known, total, at = 0, 0, 0
    templates = {template for plot in PLOTS for slot in plot.slots for template in slot if template}
    while at < len(text):
        ends = [match.end() for template in templates if (match := _pattern(template).match(text, at))]
        known, total = known + bool(ends), total + 1
        stop = re.compile(r'[.!?]"?(?: |$)').search(text, at)
        at = max(ends) if ends else stop.end() if stop else len(text)
    return known, total


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression with one group for each field, and the space up to the next sentence."""
    parts = _FIELD.split(template)
    seen: set[str] = set()
    for i in range(1, len(parts), 2):
        field = parts[i]
        words = sorted(BASE.get(field) or DERIVED[field], key=len, reverse=True)
        parts[i] = f"(?P={field})" if field in seen else f"(?P<{field}>{'|'.join(map(re.escape, words))})"
        seen.add(field)
    parts[::2] = map(re.escape, parts[::2])
    return re.compile("".join(parts) + r"(?: (?=.)|$)", re.DOTALL)
