"""What LLVM makes of a kernel, for CPUs that need not be here: widths of vectors, products, what finds no register.

    inspect_plan(plan, AVX2)    MachineCodeReport(vector_bytes=32, full_width=0.97, access_bytes=32, fma=54, ...)

It stands in the assembly. LLVM says in comments which block belongs to which loop, and where a register is kept on the stack:

    .LBB0_16:                               # %inside.i
                                            # =>  This Inner Loop Header: Depth=2
        vmulps  64(%rsp), %zmm2, %zmm3      # 64-byte Folded Reload
"""

import re
import time
from dataclasses import dataclass
from typing import Any

from ..launch import LaunchPlan
from . import codegen, drivers, perf
from .front_end import read_plan
from .lowering import lower
from .machine import Machine


@dataclass(frozen=True)
class MachineCodeReport:
    """What a kernel's machine code holds. Instructions are counted as they stand in it, whatever loop they are in.

    `vector_bytes` is of the widest vector register, `full_width` the share of vector instructions that work on the machine's full registers, `access_bytes` the most that
    one load or store moves. `spills` are vector registers saved to the stack, and constants and registers read from there;
    `spills_in_loops` those in innermost loops, where the time goes, of `vectors_in_loops` vector instructions there.
    `compile_ms` is time of this CPU from Python to an object file. `has_products`: the kernel has a `tl.dot`.
    """

    vector_bytes: int
    full_width: float
    access_bytes: int
    fma: int
    bf16_products: int
    spills: int
    spills_in_loops: int
    vectors_in_loops: int
    code_bytes: int
    compile_ms: float
    has_products: bool


def inspect_plan(plan: LaunchPlan, machine: Machine) -> MachineCodeReport:
    """Compiles `plan` for `machine` and reads the code."""
    name = str(plan.kernel.__name__)
    start = time.process_time()
    function = read_plan(plan)
    ir = drivers.with_work_function(lower(function, {}, machine), name, machine)
    image = codegen.emit_object(ir, name, machine)
    seconds = time.process_time() - start
    return MachineCodeReport(
        **read_assembly(codegen.emit_assembly(ir, machine), machine),
        code_bytes=sum(size for _, _, size in perf.functions(image)),
        compile_ms=1e3 * seconds,
        has_products=any(op.kind == "tt.dot" for op in function.ops()),
    )


def read_assembly(assembly: str, machine: Machine) -> dict[str, Any]:
    """What the report says of the instructions."""
    instructions, innermost = _parse(assembly)
    vectors = [(each, width) for each in instructions if (width := _vector_bytes(each, machine))]
    full = [each.name for each, width in vectors if width == machine.vector_bytes]
    spills = [each.loop for each, _ in vectors if each.is_spill]
    return dict(
        vector_bytes=max((width for _, width in vectors), default=0),
        full_width=len(full) / len(vectors) if vectors else 0.0,
        access_bytes=max((_access_bytes(each, width, machine) for each, width in vectors), default=0),
        fma=sum(_FMA.fullmatch(name) is not None for name in full),
        bf16_products=sum(each.name in _BF16_PRODUCTS for each in instructions),
        spills=len(spills),
        spills_in_loops=sum(loop in innermost for loop in spills),
        vectors_in_loops=sum(each.loop in innermost for each, _ in vectors),
    )


@dataclass(frozen=True)
class _Instruction:
    name: str
    operands: str
    is_spill: bool
    loop: str | None  # the label of the innermost loop around it


_LABEL = re.compile(r"\.L(BB\d+_\d+):|(?:#|//) %bb\.\d+:")
_IN_LOOP = re.compile(r"in Loop: Header=(BB\d+_\d+)")
_INSTRUCTION = re.compile(r"\t([a-z][\w.]*)(?:\t(.*?))?(?:\s+(?:#|//) (.*))?$")
_X86_BYTES = {"z": 64, "y": 32, "x": 16}
_BF16_PRODUCTS = ("vdpbf16ps", "tdpbf16ps")  # of vectors, of tiles
_FMA = re.compile(r"vfn?m(add|sub)\d+p[sd]|fml[as]")
# how much smaller than its register an instruction's operand in memory is
_NARROWER = {
    2: r"vpmov[sz]x(bw|wd|dq)|vcvtph2ps|vcvtps2ph|vcvtps2pd|vpmov(wb|dw|qd)",
    4: r"vpmov[sz]x(bd|wq)|vpmov(db|qw)",
    8: r"vpmov[sz]xbq|vpmovqb",
}


def _parse(assembly: str) -> tuple[list[_Instruction], set[str]]:
    """All instructions, and the labels of the loops that have no loop inside."""
    instructions: list[_Instruction] = []
    innermost: set[str] = set()
    label = loop = None
    for line in assembly.splitlines():
        if block := _LABEL.match(line):
            label, loop = block[1], None
        if around := _IN_LOOP.search(line):
            loop = around[1]
        elif header := re.search(r"=>\s*This (Inner )?Loop Header", line):
            loop = label
            if label and header[1]:
                innermost.add(label)
        elif found := _INSTRUCTION.match(line):
            is_spill = re.search(r"-byte (Folded )?(Spill|Reload)", found[3] or "") is not None
            instructions.append(_Instruction(found[1], found[2] or "", is_spill, loop))
    return instructions, innermost


def _vector_bytes(instruction: _Instruction, machine: Machine) -> int:
    """Of the widest vector register of an instruction; 0 for what works on single numbers."""
    operands = instruction.operands
    if machine.is_x86:
        if re.search(r"s[sdh]$|^v?mov[dq]$|^vp(extr|insr)", instruction.name):
            return 0
        return max((_X86_BYTES[size] for size in re.findall(r"%([xyz])mm\d", operands)), default=0)
    if re.search(r"\bq\d+\b|\bv\d+\.(16b|8h|4s|2d)\b", operands):
        return 16
    return (
        8
        if re.search(r"\bv\d+\.(8b|4h|2s)\b", operands)
        or re.match(r"(ld|st)[rpu]+\td\d", f"{instruction.name}\t{operands}")
        else 0
    )


def _access_bytes(instruction: _Instruction, width: int, machine: Machine) -> int:
    """What a vector instruction loads or stores; 0 for the stack, for constants, and for single elements."""
    name, operands = instruction.name, instruction.operands
    if not machine.is_x86:
        is_access = re.match(r"(ld|st)([rpu]|1$)", name) is not None and "[" in operands
        return width if is_access and not re.search(r"\[sp\b|:lo12:|\}\[", operands) else 0
    if "(" not in operands or re.search(r"%r[is]p[,)]|\{1to", operands) or re.search("broadcast|gather|scatter", name):
        return 0
    return width // next((times for times, names in _NARROWER.items() if re.fullmatch(names, name)), 1)
