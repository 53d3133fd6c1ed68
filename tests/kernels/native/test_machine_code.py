"""Every plan compiled for CPUs that are not here, and held to a bound by what its machine code says."""

from dataclasses import replace

import pytest
import torch

from llama_fast.kernels.catalog import OPS, examples, inspect_example
from llama_fast.kernels.launch import CPU
from llama_fast.kernels.layer_norm_backward import plan_layer_norm_backward
from llama_fast.kernels.native import codegen, inspection
from llama_fast.kernels.native.front_end import Specialization
from llama_fast.kernels.native.llvmlite_compat import has_llvmlite
from llama_fast.kernels.native.machine import AVX2, AVX512, MACHINES, NEON
from llama_fast.kernels.rms_norm_backward import plan_rms_norm_backward
from tests.parity import compiles_kernels

pytestmark = [compiles_kernels, pytest.mark.skipif(not has_llvmlite(), reason="llvmlite is not installed")]

FULL_WIDTH = 0.45  # of the vector instructions: each bfloat16 widened or narrowed has a half one beside it
RELOADS = 2  # in innermost loops on AVX-512: constants that found no register among 32
SPILL_SHARE = (
    0.12  # of the vector instructions of innermost loops elsewhere: exp alone has more constants than AVX2 registers
)
# as float32 in the accumulators, half as wide in memory; the 16 x 16 tile of cross entropy is read by its rows of 8
NARROW_ACCESS = {"cross_entropy_kernel"}
# the one copies bfloat16, 32 bytes at a time; the other takes angles too large for its steps out of their vector and back, lane by lane
HALF_WIDTH = {"embedding_kernel", "rotary_angles_kernel"}
MANY_CONSTANTS = {"rotary_angles_kernel"}  # sine and cosine, of some hundred numbers a step


def op_and_machine():
    """Every op for one machine, the three in turn. The rest waits for the night."""
    machines = ("avx512_bf16", "avx2", "neon")
    for i, op in enumerate(OPS):
        for j, machine in enumerate(machines):
            yield pytest.param(op, machine, marks=[] if i % 3 == j else [pytest.mark.nightly])


@pytest.mark.parametrize(("op", "name"), op_and_machine())
def test_machine_code_keeps_the_bound(op, name, request):
    machine = MACHINES[name]
    plans = list(examples(op, machine))
    if not request.config.getoption("--nightly"):
        plans = list({example.kernel: example for example in plans}.values())
    rows = [inspect_example(example, machine) for example in plans]
    assert rows
    broken = [f"{row['kernel']} {row['shape']}: {fault}" for row in rows for fault in faults(row, machine)]
    assert not broken, "\n".join(broken)


def faults(row, machine):
    """What a row breaks of the bound."""
    if row["vector_bytes"] != machine.vector_bytes:
        yield f"vectors of {row['vector_bytes']} bytes, {machine.name} has {machine.vector_bytes}"
    if row["full_width"] < FULL_WIDTH and row["kernel"] not in HALF_WIDTH:
        yield f"only {row['full_width']:.0%} of the vector instructions are {machine.vector_bytes} bytes wide"
    if 2 * row["access_bytes"] < machine.vector_bytes and row["kernel"] not in NARROW_ACCESS:
        yield f"widest load or store {row['access_bytes']} bytes"
    spills, allowed = row["spills_in_loops"], int(SPILL_SHARE * row["vectors_in_loops"])
    if spills > (RELOADS if machine.vector_bytes == 64 else allowed) and row["kernel"] not in MANY_CONSTANTS:
        yield f"{spills} of {row['vectors_in_loops']} vector instructions in innermost loops are for the stack"
    if row["has_products"] and not row["fma"] + row["bf16_products"]:
        yield f"no FMA of {machine.vector_bytes} bytes in a kernel with products"
    attends_or_multiplies = row["op"] in ("attention", "attention_decode", "linear") and row["has_products"]
    if machine.has_bf16_products and attends_or_multiplies and not row["bf16_products"]:
        yield "no product of bfloat16"


@pytest.mark.parametrize("op", ["rms_norm", "linear"])
def test_narrow_code_breaks_the_bound(op):
    """What LLVM makes of a lowering that takes a CPU with AVX-512 for one with half of it."""
    narrow = replace(AVX512, vector_bytes=32)
    example = next(examples(op, AVX512))
    said = list(faults(inspect_example(example, narrow), AVX512))
    assert any("vectors of 32 bytes, avx512 has 64" in fault for fault in said)


@pytest.mark.parametrize("as_float32", [False, True])
def test_bfloat16_products_are_the_machines_own_or_float32s(as_float32):
    """vdpbf16ps, or FMAs of what was converted when it was packed."""
    machine = replace(MACHINES["avx512_bf16"], prefers_float32=as_float32)
    example = next(each for each in examples("linear", machine) if each.kernel == "linear_kernel")
    row = inspect_example(example, machine)
    assert (row["bf16_products"] == 0) == as_float32
    assert (row["fma"] == 0) != as_float32


BREAKS = [
    dict(vector_bytes=16), dict(full_width=0.3), dict(access_bytes=16), dict(spills_in_loops=3), dict(fma=0, bf16_products=0),
    dict(bf16_products=0),
]  # fmt: skip


@pytest.mark.parametrize("worse", BREAKS, ids=str)
def test_each_bound_can_be_broken(worse):
    good = dict(
        op="linear", kernel="linear_kernel", vector_bytes=64, full_width=0.8, access_bytes=32, fma=0, bf16_products=35,
        spills_in_loops=2, vectors_in_loops=100, has_products=True,
    )  # fmt: skip
    machine = MACHINES["avx512_bf16"]
    assert not list(faults(good, machine))
    assert list(faults(good | worse, machine))


@pytest.mark.parametrize("machine", [AVX512, AVX2, NEON], ids=lambda machine: machine.name)
@pytest.mark.parametrize("more", [-8, 8])
def test_sums_beyond_the_registers_are_counted_as_spills(machine, more):
    """A loop with as many running sums as the CPU has vector registers, and some more or less."""
    assembly = codegen.emit_assembly(sums_ir(machine, machine.vector_registers + more), machine)
    found = inspection.read_assembly(assembly, machine)
    assert (found["vector_bytes"], found["access_bytes"]) == (machine.vector_bytes, machine.vector_bytes)
    assert found["full_width"] > 0.6  # registers are set to zero by their lower half
    assert (found["spills_in_loops"] > 0) == (more > 0)
    assert found["fma"] == machine.vector_registers + more


def sums_ir(machine, sums):
    vector = f"<{machine.lanes(4)} x float>"
    numbers = range(sums)
    lines = [
        f"define void @f(ptr %p, ptr %q, i64 %n) {machine.function_attributes} {{", "entry:", "  br label %loop", "loop:",
        "  %i = phi i64 [ 0, %entry ], [ %j, %loop ]",
        *(f"  %s{k} = phi {vector} [ zeroinitializer, %entry ], [ %t{k}, %loop ]" for k in numbers),
        f"  %a = getelementptr {vector}, ptr %p, i64 %i", f"  %x = load {vector}, ptr %a",
        *(f"  %b{k} = getelementptr {vector}, ptr %a, i64 {k + 1}" for k in numbers),
        *(f"  %y{k} = load {vector}, ptr %b{k}" for k in numbers),
        *(f"  %t{k} = call {vector} @llvm.fma({vector} %x, {vector} %y{k}, {vector} %s{k})" for k in numbers),
        "  %j = add i64 %i, 1", "  %c = icmp ult i64 %j, %n", "  br i1 %c, label %loop, label %out", "out:",
        *(f"  %r{k} = getelementptr {vector}, ptr %q, i64 {k}" for k in numbers),
        *(f"  store {vector} %t{k}, ptr %r{k}" for k in numbers),
        "  ret void", "}",
    ]  # fmt: skip
    return "\n".join(lines).replace("@llvm.fma(", f"@llvm.fma.v{machine.lanes(4)}f32(") + (
        f"\ndeclare {vector} @llvm.fma.v{machine.lanes(4)}f32({vector}, {vector}, {vector})"
    )


@pytest.mark.parametrize("n", [1000, 20000])
def test_a_frozen_weight_has_no_sums(n):
    """LLVM drops on a GPU what is added up for nobody; on a CPU it is a pass over a row in memory."""
    x, stat, weight = (torch.empty(size, device="meta") for size in ((8, n), (8,), (n,)))
    for dweight in (weight, None):
        plans = [
            *plan_rms_norm_backward(x, x, weight, stat, x, dweight=dweight, offset=0.0, gpu=CPU),
            *plan_layer_norm_backward(x, x, weight, stat, stat, x, dweight=dweight, dbias=dweight, gpu=CPU),
        ]
        kept = [plan for plan in plans if "p_dh" in plan.arguments]
        assert len(kept) == 2
        for plan in kept:
            assert ("iter_args" in Specialization(plan).ttir()) == (dweight is not None)


def test_the_size_of_the_code_and_the_time_it_took():
    row = inspect_example(next(examples("softmax", AVX512)), AVX512)
    assert 500 < row["code_bytes"] < 20_000 and 1 < row["compile_ms"] < 20_000
