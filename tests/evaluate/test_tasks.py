"""Tasks: the built-in ones, those from files, and what is wrong with a file."""

import json
from pathlib import Path

import pytest
from datatrove.data import Document
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.data import stories
from llama_fast.data.bpe import BpeConfig, train_tokenizer
from llama_fast.data.shard_writer import ShardWriter
from llama_fast.engine.llm import EMBEDDED_MODEL
from llama_fast.evaluate import story_tasks
from llama_fast.evaluate.files import read_task
from llama_fast.evaluate.result import Evaluation
from llama_fast.evaluate.run import evaluate, fingerprint
from llama_fast.evaluate.tasks import PromptTask, TextTask
from llama_fast.reports.jsonfile import read_json
from tests.parity import not_interpreted

pytestmark = not_interpreted


def write_jsonl(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


# --- shards ---------------------------------------------------------------------------------------------------------------


def test_documents_of_shards_are_texts(tmp_path):
    """Made with the shards' own tokenizer, so that a model with another one can be judged by them."""
    made = train_tokenizer(["once upon a time"] * 9, tmp_path / "tokenizer", BpeConfig(vocab_size=280))
    texts = ["Once upon a time.", "人工智能", "the end"]
    ShardWriter(str(tmp_path / "held_out"), made.folder).run((Document(text=text, id=text) for text in texts), 0, 1)
    task = read_task(tmp_path / "held_out", limit=2)
    assert (task.name, list(task.documents)) == ("held_out", texts[:2])
    (tmp_path / "held_out" / "00000_00000.ds").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000_00000\.ds"):
        read_task(tmp_path / "held_out")


def test_a_folder_without_shards_is_named(tmp_path):
    train_tokenizer(["a"], tmp_path / "tokenizer", BpeConfig(vocab_size=280))
    (tmp_path / "empty").mkdir()
    said = CliRunner().invoke(app, ["eval", "embedded", str(tmp_path / "empty")])
    assert said.exit_code == 2 and "has no shards" in " ".join(said.output.split())


# --- stories -----------------------------------------------------------------------------------------------------------


def test_questions_are_right_where_the_grammar_says_so(llm):
    answers = story_tasks.story_questions(limit=12, seed=1).run(llm)
    right = [example.statistics["accuracy"] for example in answers.examples]
    assert sum(x for (x,) in right) >= 9
    for example, (value,) in zip(answers.examples, right, strict=True):
        assert value == example.statistics["exact_match"][0] == float(example.output == example.references[0])
        assert stories.is_held_out(stories.check(f"{example.prompt} {example.references[0]}"))


def test_summaries_have_every_right_one_as_a_reference(llm):
    answers = story_tasks.story_summaries(limit=4).run(llm)
    for example in answers.examples:
        assert len(example.references) > 1
        assert all(story_tasks.is_right(example.prompt, reference) for reference in example.references)
        assert (example.output in example.references) == bool(example.statistics["accuracy"][0])
    assert answers.metrics[0] == "accuracy"


def test_a_wrong_answer_is_wrong():
    (example,) = stories.write_documents("question", 1, seed=0, held_out=True)
    assert story_tasks.is_right(example.prompt, example.completion.strip())
    assert not story_tasks.is_right(example.prompt, "She went home.")
    assert not story_tasks.is_right(example.prompt, "")


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_a_chat_task_goes_through_the_template(llm):
    task = PromptTask(
        name="a", prompts=["Tell me a story about Mia."], references=[["x"]], scores=["chrf"], chat=True, max_tokens=4
    )
    right = llm.chat([{"role": "user", "content": "Tell me a story about Mia."}], params_of(4)).text.strip()
    assert task.run(llm).examples[0].output == right != ""


def params_of(max_tokens):
    from llama_fast.engine.sampling import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens)


def test_a_stop_string_ends_an_output(llm):
    prompts, options = ["Once upon a time, there was"], dict(references=[["x"]], scores=["f1"], max_tokens=40)
    whole = PromptTask(name="a", prompts=prompts, **options).run(llm).examples[0].output
    cut = PromptTask(name="a", prompts=prompts, stop=["."], **options).run(llm).examples[0].output
    assert cut == whole.partition(".")[0] != whole


def test_a_prompt_without_room_is_named_before_anything_is_computed(llm):
    task = PromptTask(name="long", prompts=["a", "a b c " * 300], references=[["x"]] * 2, scores=["f1"])
    with pytest.raises(
        ValueError, match=r"long: prompt 1 has \d+ tokens, which with max_tokens=128 are more than the context of 512"
    ):
        task.run(llm)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(prompts=[], references=[]), "needs references, got 0 prompts"),
        (dict(references=[["x"], []]), "got 2 prompts and 1 with references"),
        (dict(references=[["x"]]), "got 2 prompts and 1 with references"),
        (dict(scores=[]), "scores must name at least one of bleu"),
        (dict(scores=["accuracy"]), 'the score "accuracy" needs a checker'),
        (dict(checker=lambda *_: True), "a checker needs it"),
    ],
)
def test_a_task_that_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        PromptTask(**dict(name="a", prompts=["p", "q"], references=[["x"], ["y"]], scores=["f1"]) | options)


def test_two_tasks_of_one_name_are_refused(llm):
    task = story_tasks.story_questions(limit=1)
    with pytest.raises(ValueError, match="two tasks are called 'questions'"):
        evaluate(llm, [task, task], model="embedded", path=EMBEDDED_MODEL)


# --- files -------------------------------------------------------------------------------------------------------------


def test_texts_and_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("eins\r\nzwei 二\n".encode())
    assert read_task(tmp_path / "a.txt") == TextTask(name="a", documents=["eins\r\nzwei 二\n"])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_task(tmp_path / "a.txt").documents == ["one"]
    file = write_jsonl(tmp_path / "b.jsonl", {"text": "one"}, {"text": "二", "id": 7}, {"text": "three"})
    assert read_task(file, limit=2).documents == ["one", "二"]


def test_a_described_task(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", {"q": "Why?", "a": ["x", "y"]}, {"q": "{Who}?", "a": "z"})
    file = tmp_path / "quiz.toml"
    file.write_text(
        'data = "d.jsonl"\nprompt = "Q: {q}\\nA:"\nreference = "a"\nscores = ["f1", "bleu:zh"]\nstop = ["\\n"]\n'
        "max_tokens = 9\nchat = true\n"
    )
    task = read_task(file)
    assert task == PromptTask(
        name="quiz", prompts=["Q: Why?\nA:", "Q: {Who}?\nA:"], references=[["x", "y"], ["z"]], scores=["f1", "bleu:zh"],
        stop=["\n"], max_tokens=9, chat=True,
    )  # fmt: skip
    file.write_text('data = "d.jsonl"\ntext = "q"\nname = "asked"\n')
    assert read_task(file, limit=1) == TextTask(name="asked", documents=["Why?"])


RIGHT = 'data = "d.jsonl"\nprompt = "{q}"\nreference = "a"\nscores = ["f1"]\n'


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("data = ", "t.toml is no TOML"),
        (RIGHT + 'promt = "x"\n', "unknown key 'promt': a task has data, prompt"),
        ('prompt = "x"\n', "has no 'data'"),
        ('data = "d.jsonl"\nprompt = "x"\n', "has no 'reference'"),
        (RIGHT + 'stop = "x"\n', "stop must be a list of strings, got 'x'"),
        (RIGHT + "max_tokens = 0\n", "max_tokens must be an integer, at least 1, got 0"),
        (RIGHT + "chat = 1\n", "chat must be true or false, got 1"),
        (RIGHT.replace("{q}", "{question}"), "d.jsonl, line 1 has no field 'question': it has q, a"),
        (RIGHT.replace('"a"', '"q2"'), "line 1 has no field 'q2'"),
        (RIGHT.replace("f1", "f2"), "scores must be of bleu, .* got 'f2'"),
        (RIGHT + 'text = "q"\n', "has 'prompt' beside 'text'"),
        (RIGHT.replace("{q}", "{q"), "t.toml: prompt cannot be filled: .*braces"),
        (RIGHT.replace("{q}", "{}"), "t.toml: prompt must name a field between braces"),
        (RIGHT.replace("{q}", "{q:d}"), "t.toml: prompt must name a field between braces"),
    ],
)
def test_a_wrong_description_is_named(tmp_path, toml, says):
    write_jsonl(tmp_path / "d.jsonl", {"q": "Why?", "a": "x"})
    (tmp_path / "t.toml").write_text(toml)
    with pytest.raises(ValueError, match=says):
        read_task(tmp_path / "t.toml")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "a.txt is empty"), ("a.txt", b"ab\xff", "a.txt is no UTF-8 text: byte 2 is 0xff"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no lines"), ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1 must hold an object"), ("a.jsonl", b'{"text": ""}\n', "line 1: text must be a text that is not empty"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no field 'text': it has body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', "line 2 holds half a character"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_task(tmp_path / name)


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_every_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zh.txt").write_text("我们昨天去公园玩了。\n" * 3)
    write_jsonl(tmp_path / "d.jsonl", {"q": "Once upon a time,", "a": "there was a brave owl named Mia."})
    (tmp_path / "t.toml").write_text(RIGHT.replace("f1", "rouge"))
    done = CliRunner().invoke(
        app, ["eval", "embedded", "questions", "zh.txt", "t.toml", "--limit", "3", "--out", "out"]
    )
    assert done.exit_code == 0, done.output
    assert "bits per byte" in done.output and "accuracy" in done.output and "xz -9" in done.output
    found = read_json(tmp_path / "out" / "evaluation.json", Evaluation)
    assert [(task.name, len(task.examples)) for task in found.tasks] == [("questions", 3), ("zh", 1), ("t", 1)]
    assert found.fingerprint == fingerprint(EMBEDDED_MODEL)
    assert found.versions["sacrebleu"][0].isdigit() and found.versions["torch"][0].isdigit()
    assert found.tasks[2].examples[0].prompt == "Once upon a time,"
    assert (tmp_path / "out" / "evaluation.html").stat().st_size > 4000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["embedded"], "give at least one task"),
        (
            ["embedded", "riddles"],
            "there is no task 'riddles': it must be stories, questions, summaries, a file, or a folder of shards",
        ),
        (["no-such-model", "questions"], "there is no folder no-such-model"),
        (["embedded", "stories", "--window", "9999"], "window must be from 2 to 512"),
        (["embedded", "--lm-eval", "missing.yaml"], "there is no file missing.yaml"),
        (["embedded", "questions", "--training-text", "none.txt"], "none.txt"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_what_was_done_before_a_task_failed_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", {"q": "Once upon a time, " * 500, "a": "there was a brave owl named Mia."})
    (tmp_path / "long.toml").write_text(RIGHT)
    done = CliRunner().invoke(app, ["eval", "embedded", "questions", "long.toml", "--limit", "2", "--out", "out"])
    assert done.exit_code == 2
    assert "out has questions" in " ".join(done.output.split())
    assert [task.name for task in read_json(tmp_path / "out" / "evaluation.json", Evaluation).tasks] == ["questions"]


def test_the_fingerprint_is_of_names_and_contents(tmp_path):
    files = {"config.json": "{}", "model.safetensors": "abc"}
    prints = []
    for change in ({}, {"config.json": "{ }"}, {"other.json": ""}, {"another.json": ""}):
        folder = tmp_path / str(len(prints))
        folder.mkdir()
        for name, text in (files | change).items():
            (folder / name).write_text(text)
        prints.append(fingerprint(folder))
    assert len(set(prints)) == 4
