"""Reads what a compiler made of a plan: registers, spills, shared memory, tensor cores, access widths, occupancy.

Needs no GPU. On NVIDIA, ptxas reports registers and spills as it assembles the kernel, and the SASS that cuobjdump
prints shows the rest; on AMD all of it stands in the assembly. Triton's wheel carries both tools.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .launch import Gpu, LaunchPlan
from .triton_compat import triton

# Per SM of sm_80, sm_90 and sm_100 (CUDA programming guide, "Technical Specifications per Compute Capability").
_REGISTERS_PER_SM = 65536
_WARPS_PER_SM = 64
_BLOCKS_PER_SM = 32
_RESERVED_SHARED_BYTES = 1024  # of each block, and beyond what one block may use
_WAVES_PER_SIMD = 8  # CDNA3
_SIMDS_PER_CU = 4

_ACCESS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class BinaryReport:
    """What one kernel binary uses. Registers are per thread, spills in bytes per thread, shared memory per program."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: str  # the instruction's name: HGMMA, HMMA, UTCHMMA, v_mfma; empty if there is none
    tensor_core_instructions: int
    access_bytes: int  # of the widest global load or store
    local_accesses_in_loops: int  # instructions that touch local memory inside a loop
    dot_rows: int  # rows of the largest matrix product in the program; 0 without one
    occupancy: float  # of the SM's warps that can be resident, 0 to 1


def inspect_plan(plan: LaunchPlan, gpu: Gpu) -> BinaryReport:
    """Compiles `plan` for `gpu` and reads the binary."""
    if not gpu.is_nvidia:
        return _read_amd(plan.compile(gpu), plan, gpu)
    # ptxas run again on the PTX would need Triton's own flags: --regAllocOptLevel alone turned 8 bytes of spill into 0.
    log = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a binary from the cache leaves no log
        plan.kernel.device_caches.pop(gpu.arch, None)
        compiled = plan.compile(gpu)
    return _read_nvidia(compiled, log.getvalue(), plan, gpu)


def _read_nvidia(compiled: Any, log: str, plan: LaunchPlan, gpu: Gpu) -> BinaryReport:
    sass = _disassemble(compiled.asm["cubin"], gpu)
    registers = int(_search(r"Used (\d+) registers", log))
    instructions = list(_instructions(sass))
    tensor_core = [name for _, name, _ in instructions if re.fullmatch(r"(HGMMA|HMMA|QGMMA|IMMA|UTC\w*MMA).*", name)]
    return BinaryReport(
        registers=registers,
        spill_bytes=sum(int(size) for size in re.findall(r"(\d+) bytes spill", log)),
        shared_bytes=compiled.metadata.shared,
        tensor_core=tensor_core[0].split(".")[0] if tensor_core else "",
        tensor_core_instructions=len(tensor_core),
        access_bytes=max((_nvidia_access_bytes(name) for _, name, _ in instructions), default=0),
        local_accesses_in_loops=_local_accesses_in_loops(instructions),
        dot_rows=_dot_rows(compiled.asm["ttir"]),
        occupancy=_nvidia_occupancy(registers, compiled.metadata.shared, plan.num_warps, gpu),
    )


def _disassemble(cubin: bytes, gpu: Gpu) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        cuobjdump = Path(triton.backends.nvidia.compiler.get_ptxas(gpu.compute_capability).path).with_name("cuobjdump")
        return subprocess.run([str(cuobjdump), "-sass", file.name], capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> Iterator[tuple[int, str, str]]:
    """(address, name, operands) of every instruction."""
    for line in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", sass):
        yield int(line[1], 16), line[2], line[3]


def _nvidia_access_bytes(name: str) -> int:
    base, *modifiers = name.split(".")
    if base in ("UTMALDG", "UTMASTG", "UBLKCP"):  # bulk copies move whole tiles
        return 16
    if base not in ("LDG", "STG", "LDGSTS"):
        return 0
    return next((_ACCESS_BYTES[modifier] for modifier in modifiers if modifier in _ACCESS_BYTES), 4)


def _local_accesses_in_loops(instructions: list[tuple[int, str, str]]) -> int:
    """A branch to a lower address closes a loop."""
    loops = []
    for address, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.split(".")[0] == "BRA" and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    local = [address for address, name, _ in instructions if name.split(".")[0] in ("LDL", "STL")]
    return sum(any(start <= address <= end for start, end in loops) for address in local)


def _nvidia_occupancy(registers: int, shared_bytes: int, num_warps: int, gpu: Gpu) -> float:
    registers_per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
    blocks = min(
        _BLOCKS_PER_SM,
        _WARPS_PER_SM // num_warps,
        _REGISTERS_PER_SM // (registers_per_warp * num_warps),
        (gpu.shared_bytes + _RESERVED_SHARED_BYTES) // (shared_bytes + _RESERVED_SHARED_BYTES),
    )
    return blocks * num_warps / _WARPS_PER_SM


def _read_amd(compiled: Any, plan: LaunchPlan, gpu: Gpu) -> BinaryReport:
    assembly = compiled.asm["amdgcn"]
    shared = compiled.metadata.shared
    widths = re.findall(r"(?:global|buffer)_(?:load|store)_(?:dword(x\d)?|b(\d+)|u?short|u?byte)", assembly)
    matrix = re.findall(r"^\s+(v_mfma_\w+)", assembly, re.MULTILINE)
    waves = int(_search(r"; Occupancy: (\d+)", assembly))  # a SIMD, as the registers allow
    programs = gpu.shared_bytes // shared if shared else _WAVES_PER_SIMD * _SIMDS_PER_CU
    return BinaryReport(
        registers=int(_search(r"\.vgpr_count:\s+(\d+)", assembly)),
        spill_bytes=int(_search(r"\.private_segment_fixed_size: (\d+)", assembly)),
        shared_bytes=shared,
        tensor_core="v_mfma" if matrix else "",
        tensor_core_instructions=len(matrix),
        access_bytes=max((int(x[1:]) * 4 if x else int(b) // 8 if b else 4 for x, b in widths), default=0),
        local_accesses_in_loops=len(re.findall(r"^\s+scratch_(?:load|store)", assembly, re.MULTILINE)),
        dot_rows=_dot_rows(compiled.asm["ttir"]),
        occupancy=min(waves, programs * plan.num_warps / _SIMDS_PER_CU) / _WAVES_PER_SIMD,
    )


def _dot_rows(ttir: str) -> int:
    return max((int(rows) for rows in re.findall(r"tt\.dot .*: tensor<(\d+)x", ttir)), default=0)


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}: this version of Triton is not supported")
    return found[1]
