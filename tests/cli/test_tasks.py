"""`summarize`, `translate`, `answer` and `complete` as a user meets them, with the embedded model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import llama_fast
from llama_fast import LLM, SamplingParams
from llama_fast.cli.main import app
from llama_fast.tasks import rows as rows_module
from tests.parity import not_interpreted

pytestmark = not_interpreted

STORY = "Mia the owl went to the river. She had a pie. Emma was hungry. Mia gave her half of it."


def invoke(*arguments, stdin=None, exit_code=0):
    result = CliRunner().invoke(app, arguments, input=stdin)
    assert result.exit_code == exit_code, result.output
    return result


def said(result):
    return " ".join(result.stderr.split())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def short(monkeypatch):
    """Batches of three rows."""
    monkeypatch.setattr(rows_module, "BATCH", 3)


def test_files_in_text_out_and_figures_on_stderr(here):
    (here / "a.txt").write_text(STORY + "\n")
    (here / "b.txt").write_text("Once upon a time")
    result = invoke("complete", "embedded", "a.txt", "b.txt", "--max-tokens", "6")
    params = SamplingParams(temperature=0, max_tokens=6)
    expected = llama_fast.complete(LLM(progress=False), [STORY, "Once upon a time"], params=params)
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    assert said(result).startswith("2 rows in ")


def test_the_four_commands_give_what_their_functions_do(here):
    (here / "a.txt").write_text(STORY)
    llm = LLM(progress=False)
    for arguments, expected in [
        (["summarize", "embedded", "a.txt", "--max-tokens", "20"], llama_fast.summarize(llm, STORY, max_tokens=20)),
        (["answer", "embedded", "a.txt", "--question", "Who?"], llama_fast.answer(llm, "Who?", STORY)),
        (["translate", "embedded", "a.txt", "--target", "French"], llama_fast.translate(llm, STORY, target="French")),
    ]:
        assert invoke(*arguments).stdout == f"{expected[0]}\n"


def test_rows_keep_their_fields_and_their_order(here, short):
    rows = [{"id": i, "context": STORY, "question": f"Who had {i} pies?", "Ä": "é🦙"} for i in range(7)]
    write_rows(here / "rows.jsonl", rows)
    invoke("answer", "embedded", "rows.jsonl", "--out", "out.jsonl", "--max-tokens", "4")
    found = read_rows(here / "out.jsonl")
    outputs = [row.pop("output") for row in found]
    assert found == rows and all(outputs)
    assert "é🦙" in (here / "out.jsonl").read_text()
    piped = invoke("answer", "embedded", "--jsonl", "--max-tokens", "4", stdin=(here / "rows.jsonl").read_text())
    assert piped.stdout == (here / "out.jsonl").read_text()


BAD = {
    b'{"text": "x"': "no JSON",
    b"[1]": "a row must be an object, got [1]",
    b'{"txt": "x"}': "the field 'text' must be a text that is not empty, got None (fields: txt)",
    b'{"text": 3}': "got 3",
    b'{"text": "  "}': "got ' '",
    b'{"text": "x", "output": "y"}': "its field 'output' would be written over",
    b'{"text": "\xff"}': "can't decode byte 0xff",
    b'{"text": "\\ud800"}': "the text is not UTF-8",
    b'{"text": "' + b"owl " * 600 + b'"}': "the context holds 512",
    b'{"text": "x", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "its brackets are nested too deep",
}


def test_a_bad_line_is_named_and_left_out(here, short):
    """Those that only the engine refuses too; the rest of their batch is computed."""
    good = b'{"text": "Once"}'
    (here / "rows.jsonl").write_bytes(b"\n".join([good, *(line for bad in BAD for line in (bad, good)), b""]))
    result = invoke("complete", "embedded", "rows.jsonl", "--out", "out.jsonl", "--max-tokens", "2", exit_code=1)
    assert len(read_rows(here / "out.jsonl")) == len(BAD) + 1
    for i, problem in enumerate(BAD.values()):
        line = next(line for line in result.stderr.splitlines() if f"rows.jsonl, line {2 + 2 * i}:" in line)
        assert line.startswith("skipped:") and problem in " ".join(line.split())
    assert f"{len(BAD) + 1} rows in" in said(result) and f"{len(BAD)} skipped" in said(result)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["summarize", "embedded", "no.txt"], None, "no.txt cannot be read: No such file"),
        (["summarize", "embedded", "."], None, ". cannot be read: Is a directory"),
        (["summarize", "/no/such", "a.txt"], None, "there is no folder /no/such"),
        (["summarize", "embedded", "a.txt", "--prompt", "x"], None, "must have {text}"),
        (["translate", "embedded", "a.txt"], None, "give the language to translate to: --target French"),
        (["summarize", "embedded", "a.txt", "--resume"], None, "--resume needs --out FILE.jsonl"),
        (["summarize", "embedded", "a.txt", "--resume", "--out", "x.txt"], None, "--resume needs --out FILE.jsonl"),
        (["summarize", "embedded", "--out", "a.txt"], STORY, "a.txt is there: remove it, or give another"),
        (["summarize", "embedded", "a.txt", "--out", "./a.txt"], None, "--out: a.txt is what is read"),
        (["complete", "embedded", "o.jsonl", "--out", "o.jsonl", "--resume"], None, "--out: o.jsonl is what is read"),
        (["summarize", "embedded", "a.txt", "--out", "o.jsonl"], None, "o.jsonl is there: go on with it by --resume"),
        (["summarize", "embedded", "a.txt", "--out", "no/x"], None, "no does not exist"),
        (["summarize", "embedded", "a.txt", "--out", "o.jsonl", "--resume"], None, "o.jsonl, line 1 is no row"),
        (["complete", "embedded", "a.txt", "--stop", ""], None, "stop"),
        (["answer", "embedded", "a.txt", "--question", " "], None, "--question: it is empty"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_before_anything_is_written(here, arguments, stdin, message):
    (here / "a.txt").write_text(STORY)
    (here / "o.jsonl").write_text('{"text": "x"}\n')
    result = invoke(*arguments, stdin=stdin, exit_code=2)
    assert message in said(result) and result.stdout == ""
    assert (here / "a.txt").read_text() == STORY and (here / "o.jsonl").read_text() == '{"text": "x"}\n'
    assert {path.name for path in here.iterdir()} == {"a.txt", "o.jsonl"}


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_text_is_left_out(here, content):
    assert "stdin: it is empty" in said(invoke("summarize", "embedded", stdin=content, exit_code=1))


def test_what_is_there_is_not_computed_again(here, short, monkeypatch):
    """A torn last line is: it is cut off before."""
    write_rows(here / "rows.jsonl", [{"text": f"Once {i}"} for i in range(8)])
    command = ["complete", "embedded", "rows.jsonl", "--max-tokens", "4", "--out"]
    invoke(*command, "whole.jsonl")
    whole = (here / "whole.jsonl").read_bytes()
    there = b"".join(whole.splitlines(keepends=True)[:5])
    (here / "part.jsonl").write_bytes(there + b'{"text": "Once 5", "outp')
    computed: list[str] = []
    real = llama_fast.tasks.complete
    monkeypatch.setattr(
        llama_fast.tasks, "complete", lambda llm, texts, **rest: computed.extend(texts) or real(llm, texts, **rest)
    )
    result = invoke(*command, "part.jsonl", "--resume")
    assert (here / "part.jsonl").read_bytes() == whole
    assert computed == ["Once 5", "Once 6", "Once 7"] and "3 rows in" in said(result) and "5 were there" in said(result)
    assert "0 rows in" in said(invoke(*command, "part.jsonl", "--resume"))
    assert len(computed) == 3
    invoke(*command, "new.jsonl", "--resume")
    assert (here / "new.jsonl").read_bytes() == whole


def test_rows_that_were_left_out_stay_so(here, short):
    """Those that only the engine refuses too: what follows them is there, and is not computed again."""
    rows = [{"text": text} for text in ("Once", "owl " * 600, "Once", "Twice", "owl " * 600, "Thrice")]
    write_rows(here / "rows.jsonl", rows)
    command = ["complete", "embedded", "rows.jsonl", "--max-tokens", "2", "--out", "out.jsonl", "--resume"]
    invoke(*command, exit_code=1)
    whole = (here / "out.jsonl").read_bytes()
    assert [row["text"] for row in read_rows(here / "out.jsonl")] == ["Once", "Once", "Twice", "Thrice"]
    (here / "out.jsonl").write_bytes(whole[: whole.index(b"Thr")])
    result = invoke(*command, exit_code=1)
    assert (here / "out.jsonl").read_bytes() == whole
    assert "line 2: it was left out before" in said(result) and "line 5: the prompt has" in said(result)
    assert "1 row in" in said(result) and "3 were there, 2 skipped" in said(result)


def test_numbers_that_are_none_and_half_characters_are_kept_and_found_again(here):
    (here / "rows.jsonl").write_text('{"text": "Once", "a": NaN, "b": "\\ud800 é"}\n{"text": "Twice"}\n')
    command = ["complete", "embedded", "rows.jsonl", "--max-tokens", "2", "--out", "out.jsonl", "--resume"]
    invoke(*command)
    first, _ = (here / "out.jsonl").read_text().splitlines()
    assert first.startswith('{"text": "Once", "a": NaN, "b": "\\ud800 é", "output": ')
    assert "0 rows in" in said(invoke(*command)) and "2 were there" in said(invoke(*command))


def test_a_file_that_is_no_output_loses_nothing(here):
    """Its last line has no end, as that of an output that was torn."""
    write_rows(here / "rows.jsonl", [{"text": "Once"}])
    (here / "mine.jsonl").write_text('{"text": "Onc", "mine": 1}')
    command = ["complete", "embedded", "rows.jsonl", "--out", "mine.jsonl", "--resume"]
    assert "mine.jsonl is no beginning of this output: its line 1" in said(invoke(*command, exit_code=2))
    assert (here / "mine.jsonl").read_text() == '{"text": "Onc", "mine": 1}'


def test_files_of_other_editors(here):
    """A mark before UTF-8, and lines that end in two characters."""
    (here / "a.txt").write_bytes(b"\xef\xbb\xbfOnce upon a time\r\n")
    (here / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Once upon a time"}\r\n')
    result = invoke("complete", "embedded", "a.txt", "a.jsonl", "--max-tokens", "6")
    expected = llama_fast.complete(
        LLM(progress=False), "Once upon a time", params=SamplingParams(temperature=0, max_tokens=6)
    )
    assert result.stdout == f"{expected[0]}\n" * 2


def test_another_input_is_not_gone_on_with(here):
    command = ["complete", "embedded", "rows.jsonl", "--max-tokens", "4", "--out", "out.jsonl", "--resume"]
    write_rows(here / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    invoke(*command)
    before = (here / "out.jsonl").read_bytes()
    for rows in ([{"text": "a"}, {"text": "c"}], [{"text": "a"}]):
        write_rows(here / "rows.jsonl", rows)
        assert "out.jsonl is no beginning of this output: its line 2" in said(invoke(*command, exit_code=2))
    assert (here / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_whole_rows_and_the_rest_follows(here, sign):
    rows = [{"text": f"Once upon a time, {i}", "id": i} for i in range(80)]
    write_rows(here / "rows.jsonl", rows)
    command = [
        *(sys.executable, "-m", "llama_fast", "complete", "embedded", "rows.jsonl", "--out", "out.jsonl"),
        *("--resume", "--max-tokens", "150", "--threads", "1"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    out = here / "out.jsonl"
    end = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(sign)
    errors = process.communicate(timeout=60)[1]
    left = read_rows(out)
    assert 0 < len(left) < len(rows) and len(left) % rows_module.BATCH == 0
    if sign == signal.SIGINT:
        assert process.returncode == 130 and f"interrupted after {len(left)} rows; --resume goes on" in errors
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in read_rows(out)] == list(range(80)) and read_rows(out)[: len(left)] == left


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_named_and_what_goes_on(here):
    write_rows(here / "rows.jsonl", [{"text": "Once"}])
    command = [sys.executable, "-m", "llama_fast", "complete", "embedded", "rows.jsonl", "--max-tokens", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", ["complete", "generate", "chat"])
def test_stdin_that_is_closed(here, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert app([command, "embedded"], standalone_mode=False) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_whoever_reads_may_stop_reading(here):
    write_rows(here / "rows.jsonl", [{"text": "Once"}] * 400)
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_fast", "complete", "embedded", "rows.jsonl", "--max-tokens", "50"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    process.stdout.read(4)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(60) == 1 and "Traceback" not in errors and "error" not in errors
