"""What the kernels share that stream a weight past few rows of x: how much of it is in flight, and starting early.

Programmatic dependent launch (sm_90 and up): a kernel starts while the one before it still runs. A boundary between two kernels in a
CUDA graph costs about 1.3 us on an H100; a kernel that takes part uses it to bring the beginning of its weight, which no kernel
writes, into L2, and waits before it touches anything else.

Source: CUDA C++ Programming Guide, programmatic dependent launch and synchronization; PTX ISA, griddepcontrol.
"""

from .launch import Gpu, cdiv
from .triton_compat import tl, triton

BYTES_IN_FLIGHT = 48 * 1024
"""Of weight, a multiprocessor: an H200 needs 36 KB (4.8 TB/s over 132 SMs at a latency of 1 us)."""

MAX_STAGES = 11
"""Depth of the ring: 10 stages of 12 KB (8 of weight, 4 of x) are 120 KB of shared memory. sm_80 has 163, sm_86 and sm_120 have 99."""

_SCRATCH_BYTES = 8 * 1024
"""Of shared memory beside the ring: a normed tile of x (4 KB) on its way to the tensor cores, sums across warps."""

PROGRAMS_PER_MULTIPROCESSOR = 4
"""That are sure to be resident: of 4 warps, with up to 128 registers a thread."""


def streaming_stages(programs: int, weight_bytes: int, x_bytes: int, gpu: Gpu) -> int:
    """Depth of the ring of tiles, one of which is being computed on; on AMD one, while the next is in registers.

    A stage has `weight_bytes` of weight and `x_bytes` of what it is multiplied with.
    """
    resident = min(programs, PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors)
    in_flight = cdiv(BYTES_IN_FLIGHT * gpu.multiprocessors, max(1, resident) * weight_bytes)
    fits = (gpu.shared_bytes - _SCRATCH_BYTES) // (weight_bytes + x_bytes)
    return max(3, min(MAX_STAGES, 1 + in_flight, fits)) if gpu.is_nvidia else 2


@triton.jit
def wait_for_previous_kernel(
    p_weight, o_n, m_n, weight_stride_n, weight_stride_k, K, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr
):
    """Prefetches the first NUM_STAGES tiles of the weight to L2, then waits for what earlier kernels wrote.

    Programmatic dependent launch, the argument for memory order: the kernel may start once every program of the one before
    has said `gdc_launch_dependents`, long before that one has written anything. `gdc_wait` returns when the kernel before
    has ended and all its writes are visible. Every thread of every program of a kernel launched this way waits, before it reads or writes
    anything but this prefetch, so a kernel ends only after all kernels before it have ended, and what holds for one
    predecessor holds for all: whatever is read (x, slots, cos, the cache) was written, and whatever is written over (q, y,
    the cache, memory that the allocator handed on) has been read. A kernel that does not take part starts after the one
    before has ended, as ever. The prefetch changes no memory, and L2 is where all SMs see the same: a weight that an
    earlier kernel writes is read after the wait with its new value.

    The next kernel may start as soon as this one no longer waits. Said before the wait, kernel after kernel could pile up
    on the SMs, all waiting for the same one.
    """
    LINE: tl.constexpr = 1024 // p_weight.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    for i in tl.static_range(NUM_STAGES):
        o_k = (i * BLOCK_K + tl.arange(0, BLOCK_K // LINE) * LINE).to(tl.int64)[None, :]
        p_line = p_weight + o_n[:, None] * weight_stride_n + o_k * weight_stride_k
        is_there = (m_n[:, None] & (o_k < K)).to(tl.int32)
        tl.inline_asm_elementwise(
            "{ .reg .pred there; setp.ne.b32 there, $2, 0; @there prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r", [p_line.to(tl.int64), is_there], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
