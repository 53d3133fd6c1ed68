"""Reading memory and nothing else: the measure of a machine's read bandwidth, and what empties a GPU's L2.

Program i sums its BLOCK elements of x, and writes one number: 4 bytes for every 4 * BLOCK that are read.
"""

import torch
from torch import Tensor

from .launch import INTERPRETED, LaunchPlan, cdiv
from .triton_compat import tl, triton

BLOCK = 8192
"""Elements a program: 32 KB, 128 bytes for each thread of 8 warps, all in flight at once."""


@triton.jit
def read_stream_kernel(p_x, p_sums, N, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_n, mask=o_n < N, other=0.0)
    tl.store(p_sums + tl.program_id(0), tl.sum(b_x, axis=0))


def plan_read_stream(x: Tensor, sums: Tensor) -> LaunchPlan:
    """x (N,) float32, contiguous; sums (cdiv(N, BLOCK),) float32."""
    return LaunchPlan(
        read_stream_kernel,
        grid=(cdiv(x.numel(), BLOCK),),
        arguments=dict(p_x=x, p_sums=sums, N=x.numel()),
        constants=dict(BLOCK=BLOCK),
        num_warps=8,
    )


def read_stream(x: Tensor) -> Tensor:
    """Reads all of x, contiguous float32, once. Returns sums of its parts, (parts,) float32; on a CPU they are one."""
    if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
        raise ValueError(f"x must be one contiguous row of float32, got {x.dtype} of shape {tuple(x.shape)}")
    if x.device.type == "cpu" and not INTERPRETED:
        return x.sum(0, keepdim=True)
    sums = x.new_empty(cdiv(x.numel(), BLOCK))
    plan_read_stream(x, sums).launch()
    return sums
