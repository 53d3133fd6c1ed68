"""Which CPU code is made for: the best of the host, another by name, or none and why."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_fast.kernels import cpu
from llama_fast.kernels.native import machine
from llama_fast.kernels.native.llvmlite_compat import has_llvmlite
from llama_fast.kernels.native.machine import AVX2, AVX512, AVX512_BF16, NEON
from tests.kernels.native.handwritten import native
from tests.parity import not_interpreted

pytestmark = not_interpreted

ROOT = Path(__file__).resolve().parents[3]
V3 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


class Features(dict):
    def flatten(self):
        return ",".join(("+" if there else "-") + name for name, there in self.items())


@pytest.fixture
def on(monkeypatch):
    """A computer with this CPU."""

    def make(*features, triple="x86_64-unknown-linux-gnu", cpu="some-cpu", version=(22, 1, 0), lacks=()):
        llvm = SimpleNamespace(
            llvm_version_info=version,
            get_process_triple=lambda: triple,
            get_host_cpu_name=lambda: cpu,
            get_host_cpu_features=lambda: Features(dict.fromkeys(features, True) | dict.fromkeys(lacks, False)),
        )
        monkeypatch.setattr(machine, "llvm", lambda: llvm)
        machine._best.cache_clear()
        return machine.host()

    monkeypatch.setattr(machine, "_may_use_tiles", lambda: True)
    monkeypatch.delenv("LLAMA_FAST_CPU_TARGET", raising=False)
    yield make
    monkeypatch.undo()
    machine._best.cache_clear()


@pytest.mark.parametrize(
    ("features", "lacks", "name", "vector_bytes", "has_bf16_products"),
    [
        (V3, (), "avx2", 32, False),
        (V3, ("avx512f", "avx512bw"), "avx2", 32, False),
        ((*V3, "avx512f"), ("avx512bw",), "avx2", 32, False),  # Knights Landing
        (V4, ("avx512bf16",), "avx512", 64, False),
        ((*V4, "avx512bf16"), (), "avx512", 64, True),
        ((*V4, "avx512bf16", "amx-tile", "amx-bf16"), (), "amx", 64, True),
        ((*V4, "avx512bf16", "amx-tile"), (), "avx512", 64, True),
    ],
)
def test_the_widest_instruction_set_of_an_x86(on, features, lacks, name, vector_bytes, has_bf16_products):
    here = on(*features, lacks=lacks)
    assert (here.name, here.vector_bytes, here.has_bf16_products) == (name, vector_bytes, has_bf16_products)
    assert here.cpu == "some-cpu" and f"+{features[0]}" in here.features and machine.why_none() is None


def test_every_aarch64_has_neon(on):
    here = on("neon", "sve", triple="aarch64-unknown-linux-gnu", cpu="neoverse-v1")
    assert (here.name, here.vector_bytes, here.cpu, here.is_x86) == ("neon", 16, "neoverse-v1", False)


@pytest.mark.parametrize(
    ("cpu", "reason"),
    [
        (dict(features=("avx",), lacks=V3, cpu="sandybridge"), "this CPU (sandybridge) lacks avx2, bmi, bmi2"),
        (dict(features=(), triple="riscv64-unknown-linux-gnu"), "this is riscv64"),
        (dict(features=(), triple="aarch64_be-unknown-linux-gnu"), "this is aarch64_be"),
        (dict(features=V4, version=(15, 0, 7)), "need llvmlite 0.45 or newer"),
    ],
    ids=["old x86", "riscv", "big endian", "old llvmlite"],
)
def test_where_there_is_none_it_says_why(on, cpu, reason):
    assert on(*cpu.pop("features"), **cpu) is None
    assert reason in machine.why_none()


def test_other_systems_have_none(on, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert on(*V4) is None and "this is darwin" in machine.why_none()


def test_a_name_takes_an_instruction_set_that_the_cpu_has_too(on, monkeypatch):
    best = on(*V4)
    monkeypatch.setenv("LLAMA_FAST_CPU_TARGET", "avx2")
    assert machine.host() == AVX2
    monkeypatch.setenv("LLAMA_FAST_CPU_TARGET", "avx512")
    assert machine.host() == best
    monkeypatch.setenv("LLAMA_FAST_CPU_TARGET", "")
    assert machine.host() == best


def test_amx_is_left_by_name_and_where_the_system_refuses_it(on, monkeypatch):
    features = (*V4, "avx512bf16", "amx-tile", "amx-bf16")
    assert on(*features).has_bf16_tiles
    monkeypatch.setenv("LLAMA_FAST_CPU_TARGET", "avx512")
    assert (machine.host().name, machine.host().has_bf16_tiles, machine.host().has_bf16_products) == (
        "avx512",
        False,
        True,
    )
    monkeypatch.delenv("LLAMA_FAST_CPU_TARGET")
    machine._best.cache_clear()
    monkeypatch.setattr(machine, "_may_use_tiles", lambda: False)
    assert machine.host().name == "avx512" and machine.host().has_bf16_products


@pytest.mark.parametrize(
    ("cpu_name", "lacks", "as_float32"),
    [
        ("emeraldrapids", ("amx-tile", "amx-bf16"), True),  # in a virtual machine that hides the matrix unit
        ("emeraldrapids", (), False),
        ("znver5", ("amx-tile", "amx-bf16"), False),  # vdpbf16ps is twice as fast as float32 there
    ],
)
def test_bfloat16_is_multiplied_as_float32_where_the_cpus_own_products_are_slower(on, cpu_name, lacks, as_float32):
    features = tuple({*V4, "avx512bf16", "amx-tile", "amx-bf16"} - set(lacks))
    on(*features, lacks=lacks, cpu=cpu_name)
    assert cpu.has_large_products(torch.bfloat16) == as_float32
    assert not cpu.has_large_products(torch.float32) and not cpu.has_large_products(torch.float16)
    with cpu.use("pytorch"):
        assert not cpu.has_large_products(torch.bfloat16)


@pytest.mark.parametrize("name", ["avx512", "neon"])
def test_a_name_that_the_cpu_cannot_run_is_an_error(on, monkeypatch, name):
    on(*V3)
    monkeypatch.setenv("LLAMA_FAST_CPU_TARGET", name)
    with pytest.raises(
        ValueError, match=f"LLAMA_FAST_CPU_TARGET={name}, but this CPU .some-cpu. has avx2 and not {name}"
    ):
        machine.host()


@pytest.mark.parametrize("name", ["AVX2", "sse", "native"])
def test_a_wrong_name_is_an_error(on, monkeypatch, name):
    on(*V3)
    monkeypatch.setenv("LLAMA_FAST_CPU_TARGET", name)
    with pytest.raises(ValueError, match=f"must be amx, avx512, avx2 or neon, got '{name}'"):
        machine.host()


def test_lanes():
    assert [each.lanes(4) for each in (AVX512, AVX512_BF16, AVX2, NEON)] == [16, 16, 8, 4]
    assert NEON.lanes(2) == 8


def python(code, **variables):
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)


HIDDEN = "import sys; sys.modules['llvmlite'] = None\n"


def test_without_llvmlite_all_imports_and_there_is_no_machine():
    names = [path.stem for path in (ROOT / "kernels" / "native").glob("*.py") if path.stem != "__init__"]
    imports = "".join(f"import llama_fast.kernels.native.{name}\n" for name in names)
    done = python(HIDDEN + imports + "from llama_fast.kernels.native.machine import *; print(host(), why_none())")
    if sys.platform == "linux":
        assert done.stdout == "None llvmlite is not installed: pip install llvmlite\n", done.stderr


def test_a_broken_llvmlite_raises_its_own_error(tmp_path):
    (tmp_path / "llvmlite").mkdir()
    (tmp_path / "llvmlite" / "__init__.py").write_text("import a_module_that_is_not_there")
    code = "from llama_fast.kernels.native.llvmlite_compat import llvm; llvm()"
    done = python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert "No module named 'a_module_that_is_not_there'" in done.stderr and done.returncode


def test_llvmlite_is_imported_when_a_kernel_is_and_not_before():
    code = """
import sys, torch, llama_fast
from llama_fast import ops
assert not [name for name in sys.modules if name.startswith("llvmlite")]
ops.softmax(torch.ones(2, 3))
print("llvmlite.binding" in sys.modules)"""
    done = python(code, LLAMA_FAST_CPU_TARGET="")
    assert done.stdout == f"{has_llvmlite()}\n", done.stderr


@native
def test_the_avx2_code_of_an_avx512_computer_runs():
    if machine.host().name not in ("avx512", "amx"):
        pytest.skip("this CPU has no AVX-512")
    code = """
from tests.kernels.native.handwritten import *
from llama_fast.kernels.native.launch import Launch
x, y = torch.arange(5.0), torch.zeros(5)
Launch(mirror_kernel(), (5,), (y.data_ptr(), x.data_ptr(), 1.0, 0.0)).function()()
print(host().name, y.tolist())"""
    done = python(code, LLAMA_FAST_CPU_TARGET="avx2")
    assert done.stdout == "avx2 [5.0, 4.0, 3.0, 2.0, 1.0]\n", done.stderr
