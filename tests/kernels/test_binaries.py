"""Every plan at LLaMA sizes, compiled for GPUs that are not here, and held to a bound by what its binary says."""

import pytest

from llama_fast.kernels.catalog import OPS, examples, inspect_example
from llama_fast.kernels.launch import GPUS
from tests.parity import compiles_kernels

pytestmark = compiles_kernels

# half a head is 128 bytes of bfloat16 for 32 threads
NARROW = {"rope_append_kernel", "rotary_angles_kernel"}
# CUDA's own sine and cosine reduce large angles in a loop over words in local memory; some hundred numbers a step
LOCAL = {"rotary_angles_kernel"}
SPILL_BOUND = 16  # bytes a thread: what ptxas leaves outside loops without a cost that can be measured


def op_and_arch():
    """Every op for sm_90 and gfx942; of sm_80 and sm_100, where ptxas takes as long, one for two ops of three. The rest waits for the night."""
    for i, op in enumerate(OPS):
        now = {"sm_90", "gfx942", ("sm_80", "sm_100", None)[i % 3]}
        for arch in GPUS:
            yield pytest.param(op, arch, marks=[] if arch in now else [pytest.mark.nightly])


@pytest.mark.parametrize(("op", "arch"), op_and_arch())
def test_binaries_keep_the_bound(op, arch):
    gpu = GPUS[arch]
    rows = [inspect_example(example, gpu) for example in examples(op, gpu)]
    assert rows or (op, arch) == ("norm_heads", "gfx942")  # separate ops there
    broken = [f"{row['kernel']} {row['shape']}: {fault}" for row in rows for fault in faults(row, gpu)]
    assert not broken, "\n".join(broken)


def faults(row, gpu):
    """What a row breaks of the bound."""
    if row["shared_bytes"] > gpu.shared_bytes:
        yield f"{row['shared_bytes']} bytes of shared memory, {gpu.arch} has {gpu.shared_bytes}"
    if not gpu.is_nvidia:
        return
    if row["spill_bytes"] > SPILL_BOUND:
        yield f"{row['spill_bytes']} bytes spilled a thread"
    if row["local_accesses_in_loops"] and row["kernel"] not in LOCAL:
        yield f"{row['local_accesses_in_loops']} local memory accesses in loops"
    if row["access_bytes"] < 16 and row["kernel"] not in NARROW:
        yield f"widest global access {row['access_bytes']} bytes"
    if gpu.arch == "sm_90" and row["dot_rows"] >= 64 and row["tensor_core"] != "HGMMA":
        yield f"tensor core instruction {row['tensor_core']!r} in a product of {row['dot_rows']} rows"
