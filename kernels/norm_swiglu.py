"""RMSNorm, the gate and up projections, and SwiGLU: for the rows of a decoding step, in one launch.

    gate, up = rms_norm(x) @ weight^T + bias; y = silu(gate) * up

The norm, the product and what they cost are in `norm_matmul.py`. Sources: arXiv:1910.07467 (RMSNorm), arXiv:2002.05202
(SwiGLU).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import flops
from .activation import activate
from .cpu import converts
from .launch import Gpu, LaunchPlan, allow_tf32, as_rows, gpu_of
from .library import call, register
from .linear import linear_op
from .norm_matmul import pair_rows, plan_pairs, project_pairs, require_norm_product
from .rms_norm import rms_norm_op
from .streaming import wait_for_previous_kernel
from .swiglu import glu_op
from .triton_compat import tl, triton
from .validate import require_kernel_dtype


@triton.jit(do_not_specialize=["M"])
def norm_swiglu_kernel(
    p_x, p_norm, p_weight, p_bias, p_y, x_stride, weight_stride_n, weight_stride_k, M, K, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr, WHOLE_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_P rows of gate (the first N of the weight) and the same of up."""
    if PDL:
        o_n, m_n = pair_rows(tl.program_id(0), N, N, BLOCK_P)
        wait_for_previous_kernel(p_weight, o_n, m_n, weight_stride_n, weight_stride_k, K, BLOCK_K, NUM_STAGES)
    b_gate, b_up = project_pairs(
        p_x, p_norm, p_weight, p_bias, 0, tl.program_id(0), tl.cast(N, tl.int64), x_stride, weight_stride_n,
        weight_stride_k, M, K, eps, BLOCK_M, BLOCK_P, BLOCK_K, EVEN_K, NUM_STAGES, INPUT_PRECISION, WHOLE_ROWS,
    )  # fmt: skip
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    tl.store(p_y + o_m * N + o_p, activate(b_gate, "silu") * b_up, mask=(o_p < N) & (o_m < M))


def plan_norm_swiglu(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *,
    eps: float, allow_tf32: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """y (M, N) from x (M, K), which has contiguous rows, and weight (2 * N, K)."""
    return plan_pairs(
        "norm_swiglu", norm_swiglu_kernel, 1, (y.shape[1],), dict(p_bias=bias, p_y=y, N=y.shape[1]),
        dict(INPUT_PRECISION="tf32" if allow_tf32 else "ieee"), weight, x, norm_weight, eps=eps, gpu=gpu,
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at the sizes of Llama-3.1-8B and 3.2-1B, as (shape, plan), for compilation ahead of time."""
    for m in (1, 4, 16):
        for hidden, intermediate in ((4096, 14336), (2048, 8192)):
            x, norm_weight, gate_up, y = (
                torch.empty(*shape, dtype=torch.bfloat16, device="meta")
                for shape in ((m, hidden), (hidden,), (2 * intermediate, hidden), (m, intermediate))
            )
            for plan in plan_norm_swiglu(x, norm_weight, gate_up, None, y, eps=1e-5, gpu=gpu):
                yield f"{m}x{hidden}x{intermediate}", plan


def _kernel(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    require_kernel_dtype(x=x)
    y = _fake(x, norm_weight, weight, bias, eps)
    for plan in plan_norm_swiglu(
        as_rows(x), norm_weight.contiguous(), weight, None if bias is None else bias.contiguous(), y,
        eps=eps, allow_tf32=allow_tf32(x), gpu=gpu_of(x.device),
    ):  # fmt: skip
        plan.launch()
    return y


def _pytorch(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    gate_up = linear_op(rms_norm_op(x, norm_weight, eps, 0.0)[0], weight, bias, None, None)
    return glu_op(*gate_up.chunk(2, 1), "silu")


def _fake(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


norm_swiglu_op = register(
    "norm_swiglu(Tensor x, Tensor norm_weight, Tensor gate_up_weight, Tensor? bias, float eps) -> Tensor",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.norm_linear,
    pytorch_is_faster=converts,
)  # fmt: skip


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, gate_up_weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """silu(gate) * up, where gate and up are projections of rms_norm(x): for the rows of a decoding step.

    Args:
        x: (rows, hidden) with 1 to 16 rows (0 is allowed), float16, bfloat16 or float32 (float64 on the CPU).
        norm_weight: (hidden,), of x's dtype, like all tensors below.
        gate_up_weight: (2 * intermediate, hidden): the rows of gate, then up.
        bias: (2 * intermediate,), or None.
        eps: of the norm.

    Returns:
        (rows, intermediate), contiguous. On a GPU the bits of a row among 2 to 16 do not depend on the other rows; a row
        alone is added up in another order.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit, or there are more than 16 rows.
        RuntimeError: an input requires a gradient and grad mode is on: use the separate ops, or `torch.no_grad()`.
    """
    require_norm_product("norm_swiglu", x, norm_weight, {"bias": bias}, gate_up_weight=gate_up_weight)
    if gate_up_weight.shape[0] % 2:
        raise ValueError(f"gate_up_weight must have an even number of rows, got {gate_up_weight.shape[0]}")
    return call(norm_swiglu_op, x, norm_weight, gate_up_weight, bias, eps)
