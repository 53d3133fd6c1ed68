"""What code generation must know of a CPU.

    host()             Machine(name="avx512", cpu="znver4", features="+avx512f,...", vector_bytes=64, ...)
    host() is None     no native kernels here, and why_none() says why

Four instruction sets are known: AVX-512 with AMX, AVX-512, AVX2 with FMA and F16C (x86-64-v3), and NEON.
`LLAMA_FAST_CPU_TARGET=avx2` takes one by name that is not the best of the host; `AMX`, `AVX512`, `AVX2` and `NEON` are the
plainest CPUs of each, for tests.
"""

import ctypes
import functools
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..variables import EnvironmentVariableError
from .llvmlite_compat import llvm, llvmlite_version


@dataclass(frozen=True)
class Machine:
    """A CPU for which LLVM makes code.

    `name` is amx, avx512, avx2 or neon; `triple`, `cpu` and `features` are LLVM's; `vector_bytes` is the width of a vector
    register and `vector_registers` their number. `has_bf16_products` says whether it has `vdpbf16ps`, which adds products
    of pairs of bfloat16 to float32, `has_bf16_tiles` whether AMX is there, which adds 16 x 16 x 32 of them.
    `prefers_float32` says that `vdpbf16ps` takes longer than converting to float32 and two multiplications there.
    """

    name: str
    triple: str
    cpu: str
    features: str
    vector_bytes: int
    vector_registers: int
    has_bf16_products: bool = False
    has_bf16_tiles: bool = False
    prefers_float32: bool = False

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith("x86_64")

    @property
    def function_attributes(self) -> str:
        """What every function must carry: without the widths LLVM splits 512-bit vectors in two on most CPUs."""
        bits = 8 * self.vector_bytes
        widths = f' "min-legal-vector-width"="{bits}" "prefer-vector-width"="{bits}"' if self.is_x86 else ""
        return "nounwind" + widths

    def lanes(self, element_bytes: int) -> int:
        """How many elements a vector register holds."""
        return self.vector_bytes // element_bytes


_X86, _ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AVX512 = Machine("avx512", _X86, "x86-64-v4", "", vector_bytes=64, vector_registers=32)
AVX512_BF16 = Machine("avx512", _X86, "x86-64-v4", "+avx512bf16", 64, 32, has_bf16_products=True)
AMX = Machine("amx", _X86, "x86-64-v4", "+avx512bf16,+amx-tile,+amx-bf16", 64, 32, True, has_bf16_tiles=True)
AVX2 = Machine("avx2", _X86, "x86-64-v3", "", vector_bytes=32, vector_registers=16)
NEON = Machine("neon", _ARM, "generic", "+neon", vector_bytes=16, vector_registers=32)
MACHINES = {"amx": AMX, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "avx2": AVX2, "neon": NEON}

# What LLVM may use of x86-64-v3, and of x86-64-v4 beyond it.
_AVX2_FEATURES = {"avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe"}
_AVX512_FEATURES = _AVX2_FEATURES | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX_FEATURES = {"amx-tile", "amx-bf16", "avx512bf16"}
# Their bfloat16 products are the matrix unit's, and where a virtual machine hides that, `vdpbf16ps` multiplies 32 numbers in the
# time of 64 in float32: oneDNN 149 against 275 GFLOP/s on two cores.
_SLOW_BF16_PRODUCTS = {"sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d"}
_OLDEST_LLVM = 20  # llvmlite 0.45: the first whose bfloat16 products take vectors of bfloat
VARIABLE = "LLAMA_FAST_CPU_TARGET"
NAMES = ("amx", "avx512", "avx2", "neon")


def host() -> Machine | None:
    """This computer's CPU, or None where there are no native kernels (`why_none()`).

    `LLAMA_FAST_CPU_TARGET` (amx, avx512, avx2 or neon) asks for an instruction set by name; an `EnvironmentVariableError` (a
    `ValueError`) says that there is none of that name, or that this CPU has not got it.
    """
    best = _best()
    return None if isinstance(best, str) else _asked_for(best, os.environ.get(VARIABLE, ""))


def why_none() -> str | None:
    """Why `host()` is None; None where it is not."""
    best = _best()
    return best if isinstance(best, str) else None


@functools.cache
def _best() -> Machine | str:
    """The machine that this CPU is at its best, or why there is none."""
    if sys.platform != "linux":
        return f"native kernels are made for Linux, and this is {sys.platform}"
    if llvm() is None:
        return "llvmlite is not installed: pip install llvmlite"
    if llvm().llvm_version_info[0] < _OLDEST_LLVM:
        return f"native kernels need llvmlite 0.45 or newer, and this is {llvmlite_version()}"
    triple, cpu, features = llvm().get_process_triple(), llvm().get_host_cpu_name(), llvm().get_host_cpu_features()
    has = {feature for feature, there in features.items() if there}
    if "amx-tile" in has and not _may_use_tiles():
        has -= _AMX_FEATURES - {"avx512bf16"}
    return _classify(triple, cpu, features.flatten(), has)


@functools.cache
def cache_bytes() -> int:
    """The last cache before memory, as Linux tells it, or 32 MiB where it does not."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)


def _may_use_tiles() -> bool:
    """Asks Linux for AMX, whose registers a process may use only then: 8 KB more of state for each of its threads."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request, tile_data) == 0


def _classify(triple: str, cpu: str, features: str, has: set[str]) -> Machine | str:
    """The widest instruction set that a CPU of these features has, or why there is none."""
    arch = triple.split("-")[0]
    if arch == "aarch64":
        return Machine("neon", triple, cpu, features, vector_bytes=16, vector_registers=32)
    if arch != "x86_64":
        return f"native kernels are made for x86_64 and aarch64, and this is {arch}"
    if has >= _AVX512_FEATURES:
        machine = Machine(
            "avx512", triple, cpu, features, 64, 32,
            has_bf16_products="avx512bf16" in has, prefers_float32=cpu in _SLOW_BF16_PRODUCTS,
        )  # fmt: skip
        return replace(machine, name="amx", has_bf16_tiles=True) if has >= _AMX_FEATURES else machine
    if has >= _AVX2_FEATURES:
        return Machine("avx2", triple, cpu, features, vector_bytes=32, vector_registers=16)
    return (
        f"native kernels need AVX2, FMA and F16C, and this CPU ({cpu}) lacks {', '.join(sorted(_AVX2_FEATURES - has))}"
    )


def _asked_for(best: Machine, name: str) -> Machine:
    """The machine that `LLAMA_FAST_CPU_TARGET` names; a CPU with AVX-512 has AVX2 too."""
    if name in ("", best.name):
        return best
    if name == "avx2" and best.name in ("avx512", "amx"):
        return AVX2
    if name == "avx512" and best.name == "amx":
        return replace(best, name=name, has_bf16_tiles=False)
    if name not in NAMES:
        raise EnvironmentVariableError(f"{VARIABLE} must be {', '.join(NAMES[:-1])} or {NAMES[-1]}, got {name!r}")
    raise EnvironmentVariableError(f"{VARIABLE}={name}, but this CPU ({best.cpu}) has {best.name} and not {name}")
