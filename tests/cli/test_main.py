"""The command line as a user meets it: what it prints, what it writes, and what it says to wrong input."""

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import llama_fast
from llama_fast import LLM, ops
from llama_fast.cli import demo_run
from llama_fast.cli.main import app
from llama_fast.fusion.layers import FusedRMSNorm
from tests.fusion.models import logits_in_float64
from tests.parity import not_interpreted

pytestmark = not_interpreted

runner = CliRunner()


def invoke(*arguments, exit_code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


def test_the_version_alone():
    assert invoke("--version").stdout == f"llama-fast {llama_fast.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in ("demo", "generate", "chat", "env", "inspect", "bench", "profile")),
        ["bench", "compare"],
    ],
)
def test_help_is_in_words(command):
    output = invoke(*command, "--help").stdout
    assert not re.search(r"<|\[x[<>]|range|\S  \[OPTIONS\]", output)
    assert "Show this message and exit." in output


def test_threads_are_as_many_as_asked_for():
    before = torch.get_num_threads()
    try:
        invoke("generate", "--threads", "3", "-p", "Once", "--max-tokens", "1")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for count in ("0", "100000"):
        assert "--threads" in " ".join(invoke("generate", "--threads", count, exit_code=2).output.split())


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch):
    asked = []

    def absent(name, **options):
        asked.append(options["local_files_only"])
        raise LocalEntryNotFoundError("no such snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    output = " ".join(invoke("demo", "--model", "some/model", exit_code=2).output.split())
    assert "no model 'some/model': there is no folder some/model the hub's cache: it is not there the hub:" in output
    assert asked == [True, False]


def test_env_names_every_op_and_why():
    output = invoke("env").stdout
    assert all(op in output for op in ops.__all__)
    assert "Why: tensors on" in output
    assert "triton" in output


def test_inspect_says_where_an_op_has_no_kernel():
    output = invoke("inspect", "--gpu", "gfx942", "--op", "norm_heads").stdout
    assert "norm_heads has no kernel of its own on gfx942: separate ops run there" in output


def test_inspect_writes_the_documented_rows(tmp_path):
    file = tmp_path / "rows.json"
    output = invoke("inspect", "--gpu", "sm_90", "--op", "swiglu", "--json", file).stdout
    assert "swiglu on sm_90" in output
    rows = json.loads(file.read_text())
    assert rows
    for row in rows:
        assert set(row) >= {
            "op", "kernel", "gpu", "shape", "dtype", "registers", "spill_bytes", "shared_bytes",
            "tensor_core_instructions", "access_bytes", "occupancy",
        }  # fmt: skip
        assert (row["op"], row["gpu"]) == ("swiglu", "sm_90")
        assert 0 < row["occupancy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--gpu", "sm_91"], "'sm_91' is not known; choose from sm_80, sm_90, sm_100, gfx942"),
        (["inspect", "--op", "matmul"], "--op: 'matmul' is not known"),
        (["inspect", "--json", "/no/such/folder/rows.json"], "the folder /no/such/folder does not exist"),
        (["demo", "--model", "/no/such/model"], "/no/such/model"),
        (["demo", "--model", "/no/[such]/model"], "/no/[such]/model"),
        (["demo", "--new-tokens", "1"], "--new-tokens"),
        (["demo", "--dtype", "int8"], "--dtype"),
        (
            ["demo", "--model", "smolm2"],
            "'smolm2' is not the name of a model on the hub (organisation/name), nor smollm2",
        ),
        (["demo", "--chat", "Who?", "--prompt", "Once"], "--prompt and --chat are two ways to begin: give one of them"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    assert message in " ".join(invoke(*arguments, exit_code=2).output.split())


@pytest.mark.parametrize("arguments", [["bench", "nothing"], ["profile", "--rounds", "0"]])
def test_the_help_that_an_error_names_is_spelled_as_it_is_typed(arguments):
    output = runner.invoke(app, arguments, prog_name="llama-fast").output
    assert f"Usage: llama-fast {arguments[0]} [OPTIONS]" in output
    assert f"Try 'llama-fast {arguments[0]} --help' for help." in output


def test_demo_proves_parity_and_names_the_implementation():
    output = invoke("demo", "--new-tokens", "24", "--rounds", "1", "--device", "cpu").stdout
    assert "CPU: Triton kernels, native" in output
    assert "these figures say nothing about the kernels" not in " ".join(output.split())
    assert "all 24" in output
    assert "pass" in output
    assert "FAIL" not in output
    for figure in ("throughput, tokens/s", "time to first token, ms", "time per token, ms", "peak memory, MiB"):
        assert figure in output


@pytest.fixture
def chat_model(tmp_path):
    """The embedded model in another place: one of the user's."""
    return shutil.copytree(demo_run.EMBEDDED_MODEL, tmp_path / "chat")


@pytest.mark.parametrize(
    ("arguments", "text", "is_question"),
    [([], demo_run.QUESTION, True), (["--chat", "Who is Mia?"], "Who is Mia?", True), (["--prompt", "Once"], "Once", False)],
)  # fmt: skip
def test_the_demo_asks_a_chat_model(arguments, text, is_question, chat_model, monkeypatch):
    begun, generate = [], demo_run._generate
    monkeypatch.setattr(demo_run, "_generate", lambda *given: begun.append(given[2].input_ids) or generate(*given))
    output = invoke("demo", "--model", chat_model, "--new-tokens", "8", "--rounds", "1", *arguments).stdout
    tokenizer = LLM(progress=False).tokenizer
    expected = tokenizer.chat([{"role": "user", "content": text}]) if is_question else tokenizer.encode(text)
    assert all(ids.tolist() == [expected] for ids in begun)
    assert (f"\n{text}\n" in output) == ("plain transformers gave the same" in output) == is_question


def test_a_model_without_a_chat_template_is_asked_nothing(chat_model):
    (chat_model / "chat_template.jinja").unlink()
    assert demo_run.PROMPT in invoke("demo", "--model", chat_model, "--new-tokens", "2", "--rounds", "1").stdout
    output = invoke("demo", "--model", chat_model, "--chat", "Who is Mia?", exit_code=2).output
    assert "the model has no chat template: it is not a chat model; give it a prompt" in " ".join(output.split())


def test_the_timed_layers_are_those_that_were_checked(monkeypatch):
    """A layer that fails its check must be left in the timed rounds too, which do without the checks."""
    rms_norm, swapped = ops.rms_norm, []

    def wrong(x, weight, eps=1e-6, **options):
        return rms_norm(x, weight, 1e3 * eps, **options)

    def noting(model, *args):
        swapped.append([name for name, module in model.named_modules() if isinstance(module, FusedRMSNorm)])
        return timed(model, *args)

    timed = demo_run._timed_generation
    monkeypatch.setattr(ops, "rms_norm", wrong)
    monkeypatch.setattr(demo_run, "_timed_generation", noting)
    result = demo_run.run_demo(new_tokens=2, rounds=1, device=torch.device("cpu"), dtype=torch.float32)
    assert result.report.count("norm") == 0
    assert swapped == [[]] * 4


def test_a_text_of_one_word_is_timed_too(tmp_path):
    """A model that wants to stop at once: the demo asks it for two tokens, for there is no time per token otherwise."""
    model = LlamaForCausalLM.from_pretrained(demo_run.EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(demo_run.EMBEDDED_MODEL)
    ids = tokenizer(demo_run.PROMPT, return_tensors="pt").input_ids
    model.generation_config.eos_token_id = int(model(ids).logits[0, -1].argmax())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = demo_run.run_demo(tmp_path, new_tokens=4, rounds=1, device=torch.device("cpu"), dtype=torch.float32)
    assert len(result.plain.token_ids) == len(result.fused.token_ids) >= 2
    assert result.plain.token_ms > 0


def test_the_reference_is_float64_throughout(monkeypatch):
    """Norms round to float32 on their way, unless they are told not to."""
    seen, error = [], demo_run.relative_error
    monkeypatch.setattr(demo_run, "relative_error", lambda actual, exact: seen.append(exact) or error(actual, exact))
    result = demo_run.run_demo(new_tokens=2, rounds=1, device=torch.device("cpu"), dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(demo_run.EMBEDDED_MODEL)(demo_run.PROMPT).input_ids
    model = LlamaForCausalLM.from_pretrained(demo_run.EMBEDDED_MODEL).eval()
    exact = logits_in_float64(model, torch.tensor([prompt + result.plain.token_ids]))
    torch.testing.assert_close(seen[0], exact, rtol=1e-12, atol=1e-12)
