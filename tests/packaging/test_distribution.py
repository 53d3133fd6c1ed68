"""What is built: sdist -> wheel with one top level and every module, and it runs where nothing else of ours is."""

import subprocess
import sys
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.decoder.gguf.files import write_model
from tests.decoder.gguf.test_model import make
from tests.parity import not_interpreted

pytestmark = not_interpreted

ROOT = Path(__file__).resolve().parents[2]


def run(*command, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from the sdist, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


def test_wheel_has_one_top_level_and_every_module(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"llama_fast"}
    expected = {f"llama_fast/{file.relative_to(ROOT / 'llama_fast')}" for file in (ROOT / "llama_fast").rglob("*.py")}
    for folder in ("kernels", "benchmarks"):
        expected |= {f"llama_fast/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*.py")}
    assert expected - set(names) == set()
    data = {"py.typed", "demo_model/model.safetensors", "kernels/tuned_plans.json"}
    data |= {
        f"{room}/report/{name}" for room in ("data", "evaluate", "profiler") for name in ("page.css", "page.html.jinja")
    }
    data |= {f"reports/{name}" for name in ("base.css", "base.html.jinja")}
    data |= {"benchmarks/report/bench.css", "benchmarks/report/bench.html.jinja"}
    assert {f"llama_fast/{name}" for name in data} <= set(names)


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory, wheel) -> Path:
    """A new environment with the wheel and what it asks for: no editable install, nothing of this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    torch = f"torch=={version('torch').split('+')[0]}"  # the build that is here: a newer one may be gigabytes
    constraints = (
        "constraints.txt" if f"\n{torch}\n" in (ROOT / "constraints.txt").read_text() else "constraints-any-torch.txt"
    )
    pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / constraints]
    probe = subprocess.run([*map(str, pip), torch], capture_output=True, text=True)
    if "No matching distribution" in probe.stderr or "Connection" in probe.stderr:
        pytest.skip("no package index can be reached to fill an empty environment")
    assert probe.returncode == 0, probe.stderr
    run(*pip, f"{wheel}[transformers,gguf]", "kernels")
    return folder / "bin"


def test_demo_runs_from_the_installed_wheel(empty_environment, tmp_path):
    output = run(empty_environment / "llama-fast", "demo", "--new-tokens", "16", "--rounds", "1", cwd=tmp_path)
    assert "all 16" in output, output
    assert "FAIL" not in output


def test_demo_reads_a_gguf_file_with_the_extra_for_it(empty_environment, tmp_path):
    write_model(tmp_path / "a.gguf", make(), "Q8_0")
    demo = ("demo", "--model", "a.gguf", "--prompt", "Once", "--new-tokens", "4", "--rounds", "1")
    assert "all 4" in run(empty_environment / "llama-fast", *demo, cwd=tmp_path)


def test_hugging_face_kernels_still_imports(empty_environment, tmp_path):
    code = "import kernels, llama_fast.kernels.launch, transformers; print(kernels.get_kernel, kernels.__file__)"
    assert "site-packages/kernels/" in run(empty_environment / "python", "-c", code, cwd=tmp_path)
