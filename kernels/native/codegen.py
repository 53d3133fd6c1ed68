"""LLVM IR text -> machine code in this process.

    code = compile_module(ir, "rms_norm_kernel", machine, key=key)     # 20 to 700 ms; `ir` defines @program
    code = cached(key, "rms_norm_kernel", machine)                     # 0.6 ms (10 the first time): made by an earlier process
    code.work                                                          # the address of its `work` function (drivers.py)

LLVM vectorises and unrolls nothing on its own: the lowering has chosen vectors and loops already. `LLAMA_FAST_DUMP=DIR` keeps what went in and what came out.
"""

import functools
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

from . import cache, drivers, perf
from .llvmlite_compat import llvm, llvmlite_version
from .machine import Machine, host
from .once import once


class Code:
    """A kernel's machine code, in memory as long as this object lives. `work` is the address of its work function."""

    def __init__(self, name: str, image: bytes) -> None:
        self.name = name
        symbol = drivers.work_symbol(name)
        self._library = load(name, image, exports=(symbol,))
        self.work: int = self._library[symbol]


def compile_module(ir: str, name: str, machine: Machine, *, key: str | None = None, ttir: str = "") -> Code:
    """Compiles the kernel `name`, whose module `ir` defines `@program`, for this computer.

    With a `key` the object is kept on disk, for `cached`. `ttir` is only written beside the dump of the module.
    """
    image = emit_object(drivers.with_work_function(ir, name, machine), name, machine, ttir=ttir)
    if key is not None:
        cache.write(_full_key(key, name, machine), image)
    return Code(name, image)


def cached(key: str, name: str, machine: Machine) -> Code | None:
    """The code that was compiled under this key before, in this process or another; None if there is none.

    `key` must hold all that `ir` follows from: kernel source, constants, types, alias classes, and the versions of Triton
    and of the lowering. What code generation itself follows from is added here. With `LLAMA_FAST_DUMP` there is none: what is
    to be kept there comes with compiling.
    """
    image = None if os.environ.get("LLAMA_FAST_DUMP") else cache.read(_full_key(key, name, machine))
    return None if image is None else Code(name, image)


def library(ir: str, name: str, *, exports: tuple[str, ...], imports: dict[str, int] | None = None) -> Any:
    """A module that is no kernel, compiled for this computer or found on disk, and linked (`load`)."""
    machine = host()
    assert machine is not None
    key = _full_key(ir, name, machine)
    image = cache.read(key)
    if image is None:
        image = emit_object(ir, name, machine)
        cache.write(key, image)
    return load(name, image, exports=exports, imports=imports)


def emit_object(ir: str, name: str, machine: Machine, *, ttir: str = "") -> bytes:
    """The object file (ELF, position-independent) of a module, for any machine."""
    stem = f"{name}-{hashlib.sha256((ir + machine.name).encode()).hexdigest()[:12]}"
    _dump(stem + ".ll", ir)
    _dump(stem + ".ttir", ttir)
    if os.environ.get("LLAMA_FAST_DUMP"):
        _dump(stem + ".s", emit_assembly(ir, machine))
    target = _target(machine)
    return target.emit_object(_optimised(ir, target, machine))


def emit_assembly(ir: str, machine: Machine) -> str:
    """The assembly text of a module, for any machine, with LLVM's comments on loops and on what is kept on the stack.

    From a module of its own: LLVM changes one as it emits it, and what it emits of it then is another program.
    """
    target = _target(machine)
    return target.emit_assembly(_optimised(ir, target, machine))


def load(name: str, image: bytes, *, exports: tuple[str, ...], imports: dict[str, int] | None = None) -> Any:
    """Links an object into this process. Returns what keeps it in memory and gives the addresses of `exports`.

    `imports` are addresses of symbols by name; those of this process (`memset`) are found without.
    """
    builder = llvm().JITLibraryBuilder().add_object_img(image).add_current_process()
    for symbol in exports:
        builder.export_symbol(symbol)
    for symbol, address in (imports or {}).items():
        builder.import_symbol(symbol, address)
    library = builder.link(_linker(), f"{name}#{next(_numbers)}")
    if os.environ.get("LLAMA_FAST_PERF") == "1":
        perf.write_map(image, exports[0], library[exports[0]])
    return library


_numbers = itertools.count()  # a library's name is not free again when the library is gone


@once
def _linker() -> Any:
    """JITLink, by ORC: an object takes 0.45 ms, where MCJIT's engine took 3 ms and 3 memory mappings."""
    return llvm().create_lljit_compiler(use_jit_link=True)


@functools.cache
def _target(machine: Machine) -> Any:
    """LLVM's target machine. Small and position-independent code: constants are operands, relative to the instruction."""
    llvm().initialize_all_targets()  # 1 ms; `inspect` and the tests compile for CPUs that are not here
    llvm().initialize_all_asmprinters()
    target = llvm().Target.from_triple(machine.triple)
    made = target.create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=3, reloc="pic", codemodel="small"
    )
    made.set_asm_verbosity(True)
    return made


def _optimised(ir: str, target: Any, machine: Machine) -> Any:
    module = llvm().parse_assembly(ir)
    module.triple, module.data_layout = machine.triple, str(target.target_data)
    module.verify()
    tuning = llvm().create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = False
    builder = llvm().create_pass_builder(target, tuning)
    builder.getModulePassManager().run(module, builder)
    return module


def _full_key(key: str, name: str, machine: Machine) -> str:
    around = drivers.with_work_function("", name, machine)
    return "\n".join((key, name, repr(machine), llvmlite_version(), repr(llvm().llvm_version_info), around))


def _dump(file: str, text: str) -> None:
    if (directory := os.environ.get("LLAMA_FAST_DUMP")) and text:
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, file).write_text(text)
