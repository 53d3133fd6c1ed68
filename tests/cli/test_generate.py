"""`generate` and `chat` as a user meets them, with the embedded model."""

import os
import select
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from llama_fast.cli.main import app
from llama_fast.cli.terminal import Conversation
from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
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
    assert "8 tokens, first after" in result.stderr and "(length)" in result.stderr
    again = invoke("generate", "-p", "-", "--temperature", "0", "--max-tokens", "8", stdin="Once upon a time")
    assert again.stdout == result.stdout


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


def test_a_chat_that_is_piped_in():
    result = invoke("chat", "--max-tokens", "8", "--temperature", "0", stdin="hello\n/reset\nhello\n\n")
    first, second, *_ = result.stdout.split("\n")
    assert first == second and first.strip() and ">" not in result.stdout


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


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_control_c_in_a_terminal():
    """In the middle of a reply it ends the reply, and the chat goes on; at the prompt it ends the chat."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "chat", "--max-tokens", "480", "--temperature", "1.2"],
        stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | {"TERM": "dumb"}, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)

    def wait_for(text):
        seen, end = b"", time.monotonic() + 30
        while text not in seen:
            assert select.select([ours], [], [], max(0.0, end - time.monotonic()))[0], f"no {text} in {seen}"
            seen += os.read(ours, 1024)

    try:
        wait_for(b"> ")
        os.write(ours, b"tell me a story\n")
        wait_for(b"story\r\n ")
        os.write(ours, b"\x03")
        wait_for(b"> ")
        os.write(ours, b"hello\n")
        wait_for(b"> ")
        os.write(ours, b"\x03")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
