"""`generate` and `chat` as a user meets them, with the embedded model."""

import os
import select
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from llama_fast.cli.engine_options import Engine
from llama_fast.cli.main import app
from llama_fast.cli.terminal import Conversation
from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from tests.decoder.models import make, save
from tests.parity import not_interpreted

pytestmark = not_interpreted

COMMAND = [sys.executable, "-m", "llama_fast"]


def invoke(*arguments, stdin=None, exit_code=0):
    result = CliRunner().invoke(app, arguments, input=stdin)
    assert result.exit_code == exit_code, result.output
    return result


def test_text_alone_on_stdout():
    result = invoke("generate", "-p", "Once upon a time", "--temperature", "0", "--max-tokens", "8")
    assert result.stdout.startswith("Once upon a time,") and "tokens" not in result.stdout
    assert "8 tokens, first after" in result.stderr and result.stderr.endswith("(length)\n")
    assert len(result.stderr.splitlines()) == 1


def test_one_token_is_one_token():
    for count, counted in (("0", "0 tokens, "), ("1", "1 token, ")):
        assert invoke("generate", "-p", "Once", "--max-tokens", count).stderr.startswith(counted)


def test_nothing_is_recorded_once_text_comes():
    """A line that says so would stand in the middle of the text."""
    params = SamplingParams(temperature=0.7, max_tokens=8)
    llm = Engine(device="cpu").open_for_one("embedded", params)
    recorded = set(llm._core.runner.steps._recorded)
    llm.generate("Once upon a time", params)
    assert set(llm._core.runner.steps._recorded) == recorded


@pytest.mark.parametrize("stdin", ["Once upon a time", "Once upon a time\n"])
@pytest.mark.parametrize("prompt", [[], ["-p", "-"]])
def test_a_prompt_from_a_pipe(prompt, stdin):
    """With the newline that `echo` ends it with, or without: the same prompt."""
    result = invoke("generate", *prompt, "--temperature", "0", "--max-tokens", "8", stdin=stdin)
    assert (
        result.stdout == invoke("generate", "-p", "Once upon a time", "--temperature", "0", "--max-tokens", "8").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], None, "give at least one prompt"),
        (["/no/such", "-p", "x"], None, "there is no folder /no/such"),
        (["--dtype", "int8", "-p", "x"], None, "dtype must be 'auto'"),
        (["--device", "gpu", "-p", "x"], None, "device must be"),
        (["--top-p", "2", "-p", "x"], None, "top_p must be more than 0"),
        (["--max-cache-tokens", "16", "-p", "the cat sat " * 9], None, "give a larger max_cache_tokens"),
        (["-p", b"a\xffb".decode(errors="surrogateescape")], None, "the text is not UTF-8: its character 1"),
        (["-p", "-"], b"\xff\xfe", "can't decode byte 0xff"),
    ],
)
def test_wrong_input_is_named(arguments, stdin, message):
    result = invoke("generate", *arguments, stdin=stdin, exit_code=2)
    assert message in " ".join(result.output.split()) and result.stdout == ""


@pytest.mark.parametrize(("command", "arguments"), [("generate", ["-p", "w3"]), ("chat", [])])
def test_a_folder_without_a_tokenizer(command, arguments, tmp_path):
    folder = save(make(), tmp_path)
    (folder / "tokenizer.json").unlink()
    result = invoke(command, str(folder), *arguments, stdin="", exit_code=2)
    assert "has no tokenizer.json: copy it" in " ".join(result.output.split()) and result.stdout == ""


def test_whoever_reads_may_stop_reading():
    """`llama-fast generate -p ... | head -c 5`."""
    process = subprocess.Popen(
        [*COMMAND, "generate", "-p", "Once upon a time", "--max-tokens", "400", "--temperature", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.read(4) == b"Once"
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(30) == 1 and "error" not in errors and "Traceback" not in errors


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_reply_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, "chat", "--max-tokens", "4"], input="hello\n", stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 2 and "the disk is full" in ended.stderr and "Traceback" not in ended.stderr


def test_a_chat_that_is_piped_in():
    result = invoke(
        "chat", "--max-tokens", "8", "--temperature", "0", stdin="hello\n/reset\nhello\n\n/help\n/exit\nmore\n"
    )
    first, second, *rest = result.stdout.split("\n")
    assert first == second and first.strip() and ">" not in result.stdout
    assert rest == [""], "nothing is said after /exit"
    assert "/reset  starts a new conversation" in result.stderr


def test_a_conversation_longer_than_the_context():
    """It is refused, and stays as it was; after a reset it goes on."""
    llm = LLM(progress=False, device="cpu", max_context=64)
    conversation = Conversation(llm, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    written: list[str] = []
    for _ in range(2):
        streamed = conversation.say("Tell me a story about a cat.", written.append)
    assert streamed.completion.finish_reason == "length"
    before = list(conversation._messages)
    with pytest.raises(ValueError, match="and the context holds 64"):
        conversation.say("Tell me more of the cat. " * 9, written.append)
    assert conversation._messages == before
    conversation.reset()
    assert conversation.say("Hello", written.append).completion.token_ids


PROMPT = "\x1b[?2004h"  # a line is read from here on: pasted text shall come in brackets
ENTERED = "\x1b[?2004l"


class Terminal:
    """`llama-fast chat` in a pseudo-terminal."""

    def __init__(self, *options: str) -> None:
        import pty

        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, "chat", *options],
            stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.seen = b""

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def wait_for(self, text: str) -> str:
        """What comes up to `text`, and since the last call."""
        end = time.monotonic() + 60
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.ours, 1024)
        before, _, self.seen = self.seen.partition(text.encode())
        return before.decode(errors="replace")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


in_a_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@in_a_terminal
def test_control_c_in_a_terminal():
    """In the middle of a reply it ends the reply, and the chat goes on; at the prompt the second one ends the chat."""
    with Terminal("--max-tokens", "480", "--temperature", "1.2") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("tell me a story\r")
        terminal.wait_for(ENTERED)
        terminal.wait_for(" ")
        terminal.type("\x03")
        assert "(cancelled)" in terminal.wait_for(PROMPT)
        terminal.type("half a line\x03")
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for(PROMPT)
        terminal.type("/help\r")
        terminal.wait_for("starts a new conversation")
        terminal.wait_for(PROMPT)
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for(PROMPT)
        terminal.type("\x03")
        assert terminal.process.wait(30) == 0


@in_a_terminal
def test_a_line_is_edited_and_comes_back():
    with Terminal("--max-tokens", "2", "--temperature", "0") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("/hXelp\x1b[D\x1b[D\x1b[D\x7f\r")  # three to the left, and away with the X
        terminal.wait_for("starts a new conversation")
        terminal.wait_for(PROMPT)
        terminal.type("\x1b[A\r")  # the line before
        terminal.wait_for("starts a new conversation")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
