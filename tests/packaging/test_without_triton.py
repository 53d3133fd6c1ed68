"""Where Triton is not installed (macOS, Windows, a musl Linux): all imports, CPU tensors run PyTorch's ops, kernels name what is missing.

Where it is installed, these tests run in a Python from which `tests/without_triton` hides it.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from llama_fast import LLM, SamplingParams, environment, fuse, ops
from llama_fast.cli.main import app
from llama_fast.engine import EMBEDDED_MODEL
from llama_fast.kernels import reference
from llama_fast.kernels.binary import inspect_plan
from llama_fast.kernels.launch import GPUS
from llama_fast.kernels.read_stream import plan_read_stream
from llama_fast.kernels.triton_compat import HAS_TRITON
from tests.parity import assert_parity, not_interpreted

pytestmark = not_interpreted

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = ROOT / "tests" / "without_triton"
MISSING = "Triton is not installed"
REMEDY = "On Linux with glibc: pip install triton"

without_triton = pytest.mark.skipif(
    HAS_TRITON, reason="Triton is installed: they run in a Python from which it is hidden"
)


def python(*arguments, triton=HIDDEN, **variables):
    """Runs a Python with `triton` first in its path: the folder that hides Triton, or one with another Triton."""
    path = os.pathsep.join([str(triton), str(ROOT)])
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


@pytest.mark.skipif(not HAS_TRITON, reason="the tests of this file run as they are")
def test_this_file_with_triton_hidden():
    chosen = "not hidden and not interpreter and not gpu and not broken"  # those that are skipped here
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, Path(__file__).relative_to(ROOT))
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


OF_OTHERS = {"llama_cpp_engine.py", "openvino_engine.py", "openvino_export.py"}


def modules():
    """The names of all modules of the package but those that other engines' environments run; `kernels` and `benchmarks` are links."""
    for folder, _, files in os.walk(ROOT / "llama_fast", followlinks=True):
        package = ".".join(Path(folder).relative_to(ROOT).parts)
        yield from (
            f"{package}.{file[:-3]}"
            for file in files
            if file.endswith(".py") and not file.startswith("__") and file not in OF_OTHERS
        )


@without_triton
def test_every_module_imports():
    names = sorted(modules())
    assert {"llama_fast.kernels.rms_norm", "llama_fast.benchmarks.suite.sweep", "llama_fast.fusion.swap"} <= set(names)
    for name in names:
        importlib.import_module(name)


@without_triton
def test_ops_run_forward_and_backward():
    def run(rms_norm, swiglu, linear_cross_entropy):
        return lambda x, weight, head: linear_cross_entropy(swiglu(rms_norm(x, weight), x), head, torch.arange(5))

    ours = run(ops.rms_norm, ops.swiglu, ops.linear_cross_entropy)
    exact = run(reference.rms_norm, reference.swiglu, reference.linear_cross_entropy)
    assert_parity(ours, exact, exact, [torch.randn(5, 64), torch.randn(64), torch.randn(100, 64)])


@without_triton
def test_a_fused_model_and_the_engine_write_what_transformers_does():
    model = LlamaForCausalLM.from_pretrained(EMBEDDED_MODEL).eval()
    prompt = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)("Once upon a time", return_tensors="pt").input_ids
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    report = fuse(model)
    assert all(report.count(kind) for kind in ("norm", "mlp", "attention")), str(report)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), expected)
    written = LLM().generate([prompt[0].tolist()], SamplingParams(temperature=0, max_tokens=12))[0]
    assert list(written.token_ids) == expected[0, prompt.shape[1] :].tolist()


@without_triton
def test_a_kernel_names_what_is_missing():
    plan = plan_read_stream(torch.ones(8), torch.empty(1))
    with pytest.raises(ModuleNotFoundError, match=f"{MISSING}.*{REMEDY}") as launched:
        plan.launch()
    assert launched.value.name == "triton"
    for use in (plan.compile, lambda gpu: inspect_plan(plan, gpu)):
        for gpu in (GPUS["sm_90"], GPUS["gfx942"]):
            with pytest.raises(ModuleNotFoundError, match=f"{MISSING}.*{REMEDY}"):
                use(gpu)


@without_triton
def test_the_command_line_says_so():
    env = " ".join(CliRunner().invoke(app, ["env"]).output.split())
    assert "triton │ not installed" in env
    assert "CPU: PyTorch ops" in env
    assert (
        "Why: tensors on the CPU run PyTorch's own ops: Triton, whose front end reads the kernels, is not installed."
        in env
    )
    inspect = CliRunner().invoke(app, ["inspect", "--op", "swiglu"])
    assert inspect.exit_code == 2
    assert f"error: {MISSING}" in inspect.output and REMEDY in inspect.output


def test_an_interpreter_that_is_asked_for_is_missing_too():
    """Not PyTorch's ops instead, without a word."""
    code = """
import torch
from llama_fast import environment, ops
print(*vars(environment.implementation_on(torch.device("cpu"))).values())
ops.swiglu(*torch.ones(2, 8))
"""
    done = python("-c", code, TRITON_INTERPRET="1")
    assert "CPU: none TRITON_INTERPRET asks for Triton's interpreter, and Triton is not installed" in done.stdout
    assert done.returncode == 1
    assert MISSING in done.stderr.splitlines()[-1] and "TRITON_INTERPRET" in done.stderr.splitlines()[-1]


def test_env_says_that_a_gpu_has_no_implementation(monkeypatch):
    monkeypatch.setattr(environment, "HAS_TRITON", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    found = environment.implementation_on(torch.device("cuda"))
    assert found.name == "NVIDIA H100: none"
    assert found.reason == "tensors on a GPU run Triton kernels, and Triton is not installed"


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("import a_dependency", "No module named 'a_dependency'"),
        ("raise ImportError('libcuda.so.1: cannot open shared object file')", "ImportError: libcuda.so.1: cannot open"),
        ("", "No module named 'triton.language'"),
    ],
)
def test_a_broken_triton_raises_its_own_error(init, message, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(init)
    done = python("-c", "import llama_fast.kernels.triton_compat", triton=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
