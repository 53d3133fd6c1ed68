"""LLVM IR to machine code, and the objects that are kept on disk: whatever is wrong with a file or a directory costs a compilation."""

import itertools
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from llama_fast.kernels.native import cache, codegen, drivers
from llama_fast.kernels.native.launch import Kernel, Launch
from llama_fast.kernels.native.machine import AVX2, AVX512, AVX512_BF16, NEON, host
from tests.kernels.native.handwritten import count_ir, mirror_ir, native
from tests.parity import not_interpreted

pytestmark = [native, not_interpreted]

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiled(key=None, ttir=""):
    return codegen.compile_module(mirror_ir(host()), "mirror", host(), key=key, ttir=ttir)


def works(code):
    x, y = torch.arange(5.0), torch.zeros(5)
    Launch(Kernel(code, "qqfd"), (5,), (y.data_ptr(), x.data_ptr(), 1.0, 0.0)).function()()
    return y.tolist() == [5, 4, 3, 2, 1]


def only_file(directory):
    (file,) = [file for file in directory.iterdir() if file.read_bytes().count(b"mirror")]
    return file


def test_what_is_compiled_under_a_key_is_found_by_it(directory):
    assert codegen.cached("a", "mirror", host()) is None
    assert works(compiled(key="a"))
    assert works(codegen.cached("a", "mirror", host()))
    assert (directory.stat().st_mode & 0o777, only_file(directory).stat().st_mode & 0o777) == (0o700, 0o600)


def test_code_from_disk_needs_no_compiler():
    """LLVM's targets for all CPUs take 10 MB of memory, of which a process that compiles nothing has none."""
    compiled(key="a")
    program = f"""
from llama_fast.kernels.native import codegen
from llama_fast.kernels.native.llvmlite_compat import llvm
from llama_fast.kernels.native.machine import MACHINES, host
assert codegen.cached("a", "mirror", host()) is not None
other = MACHINES["{"neon" if host().is_x86 else "avx2"}"]
try:
    llvm().Target.from_triple(other.triple)
except RuntimeError:
    print("not yet")
codegen.emit_object("define void @nothing() {{ ret void }}", "nothing", other)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout == "not yet\n"


def test_another_key_name_or_machine_is_not_found():
    compiled(key="a")
    assert codegen.cached("b", "mirror", host()) is None
    assert codegen.cached("a", "other", host()) is None
    assert codegen.cached("a", "mirror", NEON) is None


def test_another_llvmlite_is_another_key(monkeypatch):
    compiled(key="a")
    monkeypatch.setattr(codegen, "llvmlite_version", lambda: "0.99")
    assert codegen.cached("a", "mirror", host()) is None


def test_without_a_key_nothing_is_kept(directory):
    assert works(compiled())
    assert not directory.exists() or not [file for file in directory.iterdir() if b"mirror" in file.read_bytes()]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-200] + bytes([content[-200] ^ 1]) + content[-199:],
        lambda content: b"other file" + content[10:],
        lambda content: content[30:],
    ],
    ids=["empty", "no header", "truncated", "longer", "one bit", "another mark", "no mark"],
)
def test_a_damaged_file_is_compiled_anew(directory, damage):
    compiled(key="a")
    file = only_file(directory)
    file.write_bytes(damage(file.read_bytes()))
    assert codegen.cached("a", "mirror", host()) is None
    compiled(key="a")
    assert works(codegen.cached("a", "mirror", host()))


def test_a_file_under_the_name_of_another_is_not_run(directory):
    compiled(key="a")
    file = only_file(directory)
    codegen.compile_module(count_ir(host()), "count", host(), key="b")
    (other,) = [each for each in directory.iterdir() if b"count.work" in each.read_bytes()]
    os.replace(other, file)
    assert codegen.cached("a", "mirror", host()) is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_directory_that_others_can_write_to_is_refused_with_one_warning(directory, mode):
    directory.mkdir()
    directory.chmod(mode)
    with warnings.catch_warnings(record=True) as warned:
        assert works(compiled(key="a"))
        assert codegen.cached("a", "mirror", host()) is None
    assert [each.category for each in warned] == [RuntimeWarning] and str(directory) in str(warned[0].message)
    assert not list(directory.iterdir())


def test_a_directory_of_another_user_is_refused(directory, monkeypatch):
    directory.mkdir(mode=0o700)
    owner = os.stat(directory).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert works(compiled(key="a"))
    assert not list(directory.iterdir())


def test_where_no_directory_can_be_made_there_is_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings(action="error"):
        assert works(compiled(key="a"))
        assert codegen.cached("a", "mirror", host()) is None


def test_a_directory_that_is_gone_or_full_is_no_failure(directory, monkeypatch):
    compiled(key="a")

    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert works(compiled(key="b"))
    assert len(list(directory.glob("*-*"))) == 0
    only_file(directory).unlink()
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    assert works(compiled(key="c"))


def used(file, days_ago):
    os.utime(file, (time.time() - 86400 * days_ago,) * 2)


def test_what_was_used_longest_ago_is_removed_beyond_a_size(directory, monkeypatch):
    monkeypatch.setattr(cache, "_writes", itertools.count())
    for key in "abcdef":
        cache.write(key, bytes(8000))
    for days, key in enumerate("cfaebd"):
        used(directory / cache._file(key), days + 2)
    half_written = directory / (cache._file("g").removesuffix(".o") + "-xy_z.o")
    for file in (half_written, directory / "notes.txt", directory / "mine.o"):
        file.write_bytes(bytes(8000))
        used(file, 300)
    cache.read("d")  # used now
    size = 512 * half_written.stat().st_blocks
    monkeypatch.setattr(cache, "MOST_BYTES", 512 * (directory / cache._file("d")).stat().st_blocks * 4 + size - 1)
    monkeypatch.setattr(cache, "_writes", itertools.count())
    cache.write("h", bytes(8000))
    assert {key for key in "abcdefh" if cache.read(key)} == set("dcfah")
    assert not half_written.exists()
    assert (directory / "notes.txt").exists() and (directory / "mine.o").exists()


def test_the_directory_follows_the_desktop_standard(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache.write("a", b"image")
    assert list((tmp_path / "xdg" / "llama-fast").iterdir())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache.write("a", b"image")
    assert list((tmp_path / "home" / ".cache" / "llama-fast").iterdir())
    assert cache.read("a") == b"image"


COMPILE = """
from tests.kernels.native.handwritten import mirror_ir
from llama_fast.kernels.native import codegen, machine
for i in range(8):
    key = str(i)
    code = codegen.cached(key, "mirror", machine.host())
    if code is None:
        code = codegen.compile_module(mirror_ir(machine.host()), "mirror", machine.host(), key=key)
    assert code.work
"""


def test_two_processes_may_compile_the_same_at_once(directory):
    processes = [subprocess.Popen([sys.executable, "-c", COMPILE], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == [b"", b""]
    assert not list(directory.glob("*-*"))
    assert all(works(codegen.cached(str(i), "mirror", host())) for i in range(8))


def test_a_later_process_finds_it_without_compiling(directory):
    compiled(key="7")
    wrong = COMPILE.replace("mirror_ir(machine.host())", "'not LLVM IR'").replace("range(8)", "(7,)")
    done = subprocess.run([sys.executable, "-c", wrong], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("machine", [AVX512, AVX512_BF16, AVX2, NEON], ids=["avx512", "avx512_bf16", "avx2", "neon"])
def test_every_machine_has_an_object_and_assembly(machine):
    ir = drivers.with_work_function(mirror_ir(machine), "mirror", machine)
    assert codegen.emit_object(ir, "mirror", machine)[:4] == b"\x7fELF"
    assert "mirror.work:" in codegen.emit_assembly(ir, machine)


@pytest.mark.parametrize(
    ("machine", "register"), [(AVX512, "zmm"), (AVX2, "ymm"), (NEON, "v0.4s")], ids=["512", "256", "128"]
)
def test_vectors_are_as_wide_as_the_machine(machine, register):
    lanes = machine.lanes(4)
    ir = f"""
    define void @f(ptr %p) {machine.function_attributes} {{
      %x = load <{lanes} x float>, ptr %p
      %y = fadd <{lanes} x float> %x, %x
      store <{lanes} x float> %y, ptr %p
      ret void
    }}"""
    assert register in codegen.emit_assembly(ir, machine)


def test_llvm_neither_vectorises_nor_unrolls():
    loop = """
    define void @f(ptr noalias %x, ptr noalias %y) {
    entry:
      br label %loop
    loop:
      %i = phi i64 [ 0, %entry ], [ %j, %loop ]
      %p = getelementptr float, ptr %x, i64 %i
      %v = load float, ptr %p
      %w = fadd float %v, 1.0
      %q = getelementptr float, ptr %y, i64 %i
      store float %w, ptr %q
      %j = add i64 %i, 1
      %c = icmp ult i64 %j, 1024
      br i1 %c, label %loop, label %out
    out:
      ret void
    }"""
    assembly = codegen.emit_assembly(loop, AVX2)
    assert assembly.count("vaddss") == 1 and "vaddps" not in assembly


def test_wrong_ir_says_what_is_wrong():
    with pytest.raises(RuntimeError, match="use of undefined value '%missing'"):
        codegen.compile_module("define void @f() { store i32 %missing, ptr null ret void }", "f", host())


def test_dump_keeps_what_went_in_and_what_came_out(tmp_path, monkeypatch):
    compiled(ttir="not written")
    monkeypatch.setenv("LLAMA_FAST_DUMP", str(tmp_path / "dump"))
    compiled(ttir="module { }")
    files = {file.suffix: file for file in (tmp_path / "dump").iterdir()}
    assert set(files) == {".ll", ".s", ".ttir"} and len({file.stem for file in files.values()}) == 1
    assert re.fullmatch(r"mirror-[0-9a-f]{12}", files[".ll"].stem)
    assert "@program" in files[".ll"].read_text() and "mirror.work:" in files[".s"].read_text()
    assert files[".ttir"].read_text() == "module { }"


def test_a_kernel_that_is_on_disk_is_dumped_too(tmp_path, monkeypatch):
    compiled(key="a")
    monkeypatch.setenv("LLAMA_FAST_DUMP", str(tmp_path / "dump"))
    assert codegen.cached("a", "mirror", host()) is None  # so it is compiled


def test_a_module_that_llvm_refuses_is_dumped_too(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_DUMP", str(tmp_path / "dump"))
    with pytest.raises(RuntimeError):
        codegen.compile_module("not LLVM IR", "f", host())
    assert [file.suffix for file in (tmp_path / "dump").iterdir()] == [".ll"]


def test_perf_learns_where_a_kernel_lies(monkeypatch):
    map_file = Path(f"/tmp/perf-{os.getpid()}.map")
    code = compiled()
    assert not map_file.exists()
    monkeypatch.setenv("LLAMA_FAST_PERF", "1")
    try:
        code = compiled()
        (address, size, name), *_ = [
            line.split() for line in map_file.read_text().splitlines() if "mirror.work" in line
        ]
        assert int(address, 16) == code.work and int(size, 16) > 50 and name == "mirror.work"
    finally:
        map_file.unlink(missing_ok=True)
