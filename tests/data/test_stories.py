"""The story generator and its checker: what is written is recognised, what is spoilt is refused, and the split holds."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from llama_fast.data import stories
from llama_fast.data.story_grammar import BASE, DERIVED, PLOTS, derive

FORMS = tuple(stories.WRITERS)


def world(story: stories.Story) -> tuple[str, str, str]:
    return story.facts["hero"], story.facts[story.plot.fields[0]], story.facts["place"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("held_out", [False, True])
def test_accepts_what_it_writes(form: str, held_out: bool) -> None:
    for document in stories.write_documents(form, 500, seed=1, held_out=held_out):
        assert stories.is_held_out(stories.check(document.text)) == held_out


def test_accepts_the_conversations_it_writes() -> None:
    rng = random.Random(2)
    for _ in range(200):
        messages = stories.write_conversation(rng, turns=3)
        assert [message["role"] for message in messages] == ["user", "assistant"] * 4
        stories.check_conversation(messages)


def test_the_same_seed_writes_the_same_text_in_every_process() -> None:
    program = (
        "from llama_fast.data import stories\n"
        "print([d.text for form in stories.WRITERS for d in stories.write_documents(form, 20, seed=3)])"
    )
    here = [d.text for form in FORMS for d in stories.write_documents(form, 20, seed=3)]
    there = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert there.stdout.strip() == str(here)
    assert len(set(here)) == len(here)
    assert here[0] != next(stories.write_documents(FORMS[0], 1, seed=4)).text


def test_training_and_held_out_worlds_are_disjoint() -> None:
    worlds = {}
    for held_out in (False, True):
        documents = stories.write_documents("story", 1500, seed=5, held_out=held_out)
        worlds[held_out] = {world(stories.check(document.text)) for document in documents}
    assert len(worlds[False]) > 1000
    assert len(worlds[True]) > 400
    assert not worlds[False] & worlds[True]


def test_a_story_prompt_tells_its_world() -> None:
    for document in stories.write_documents("story", 300, seed=6):
        assert all(word in document.prompt for word in world(stories.check(document.text)))
        assert document.completion.startswith(" ")
        assert document.prompt.endswith(".")


def test_every_plot_and_trouble_is_written() -> None:
    told = [stories.check(document.text) for document in stories.write_documents("story", 400, seed=7)]
    assert {story.plot.fields[0] for story in told} == {plot.fields[0] for plot in PLOTS}
    assert {story.facts.get("trouble") for story in told} == {None, *BASE["trouble"]}


def test_the_grammar_knows_every_field_it_uses() -> None:
    for plot in PLOTS:
        texts = [
            *(t for slot in plot.slots for t in slot),
            *(t for pair in plot.questions for t in pair),
            *plot.summaries,
        ]
        used = set(re.findall(r"{(\w+)}", " ".join(texts)))
        assert used <= BASE.keys() | DERIVED.keys()
        assert all(len(derive({field: value})[field]) > 0 for field in used & BASE.keys() for value in BASE[field])


def test_a_question_has_one_answer() -> None:
    for document in stories.write_documents("question", 200, seed=8):
        questions = [question for question, _ in stories.questions(stories.check(document.text))]
        assert len(questions) == len(set(questions)) > 4


def swapped_name(text: str) -> str:
    """Another hero in the last sentence that names the hero."""
    name = stories.check(text).facts["hero"]
    other = "Anna" if name != "Anna" else "Rosa"
    head, _, tail = text.rpartition(name)
    return head + other + tail


def shuffled(text: str) -> str:
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)


CORRUPTIONS: dict[str, tuple[str, Callable[[str], str], str]] = {
    "swapped name": ("story", swapped_name, r"hero is|friend is|hero and friend"),
    "word salad": ("story", shuffled, "expected a sentence like|wrong article"),
    "truncated sentence": ("story", lambda text: text[:-1], "expected a sentence like"),
    "missing end": ("story", lambda text: " ".join(re.split(r"(?<=\.) ", text)[:4]), "expected a sentence like"),
    "no end": ("story", lambda text: f"{text} {text}", "the story was over"),
    "double space": ("story", lambda text: text.replace(". ", ".  ", 1), "expected a sentence like"),
    "wrong pronoun": (
        "story",
        lambda text: re.sub(r"\b(He|She)\b", lambda m: "She" if m[0] == "He" else "He", text, count=1),
        "He is|friend_He is",
    ),
    "wrong article": ("story", lambda text: re.sub(r"\ba ", "an ", text, count=1), "wrong article"),
    "wrong answer": ("question", lambda text: f"{text[:-1]} today.", "is answered by"),
    "no answer": ("question", lambda text: text.rpartition("\n")[0] + "\nAnswer:", "does not answer|is answered by"),
    "summary of another story": (
        "summary",
        lambda text: (
            text.partition("Summary:")[0]
            + "Summary: At the lake, Tom the frog lost a red ball. Mia the dog helped him."
        ),
        "the summary is one of",
    ),
    "neither question nor summary": ("summary", lambda text: text.replace("\nSummary", "\nMoral"), "after the story"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_refuses_what_is_spoilt_and_says_why(name: str) -> None:
    form, spoil, why = CORRUPTIONS[name]
    spoilt = 0
    for document in stories.write_documents(form, 50, seed=9):
        text = spoil(document.text)
        if text == document.text:  # no pronoun, for one, to spoil
            continue
        spoilt += 1
        with pytest.raises(stories.GrammarError, match=why):
            stories.check(text)
    assert spoilt > 25


def test_refuses_the_answer_to_another_question() -> None:
    for document in stories.write_documents("question", 50, seed=10):
        story = stories.check(document.text)
        (question, _), (_, answer) = stories.questions(story)[:2]
        with pytest.raises(stories.GrammarError, match="is answered by"):
            stories.check_answer(story, question, answer)


LOST_KITE = (
    "Once upon a time, there was a shy dog named Mia. One hot morning, Mia went to the lake. She had a red kite with her. "
    "Suddenly, the kite flew into a tall tree. Mia was sad, because the tree was too high. "
    "Then an owl named Tom came by. Tom flew up to the top of the tree and brought the kite back. Mia gave Tom a big hug. "
    "Mia and Tom never forgot that hot morning."
)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("an owl", "a crow", None),
        ("an owl", "a frog", "rescue is 'swam out'"),
        ("Tom flew up to the top of the tree", "Tom climbed up the tree", "rescue is 'flew up"),
        ("shy dog", "shy cat", "needs no help"),
        ("tree was too high", "water was too deep", "reason is 'the tree was too high'"),
        ("kite", "bell", "a bell never flew"),
        ("kite back", "hat back", "toy is 'kite'"),
        ("hot morning.", "hot evening.", "time is 'morning'"),
        ("Tom", "Mia", "hero and friend at once|friend is"),
        ("an owl", "a dog", "rescue is 'dug in the ground'"),
    ],
)
def test_refuses_a_story_that_contradicts_itself(old: str, new: str, why: str | None) -> None:
    stories.check(LOST_KITE)
    text = LOST_KITE.replace(old, new)
    assert text != LOST_KITE
    if why is None:
        stories.check(text)
    else:
        with pytest.raises(stories.GrammarError, match=why):
            stories.check(text)


def test_refuses_a_conversation_about_something_else() -> None:
    messages = stories.write_conversation(random.Random(11))
    for i, content in ((0, "Tell me a story about Nobody."), (3, "I do not know."), (1, "Once upon a time.")):
        spoilt = [dict(message) for message in messages]
        spoilt[i]["content"] = content
        with pytest.raises(stories.GrammarError):
            stories.check_conversation(spoilt)
