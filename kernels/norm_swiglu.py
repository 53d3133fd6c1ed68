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
from .matmul import plan_linear
from .norm_matmul import pair_rows, plan_pairs, project_pairs, require_no_gradient, require_norm_product
from .rms_norm import plan_rms_norm, rms_norm_op
from .rows import contiguous
from .streaming import wait_for_previous_kernel
from .swiglu import glu_op, plan_glu
from .triton_compat import tl, triton
from .validate import require_kernel_dtype, require_shape


@triton.jit(do_not_specialize=["M"])
def norm_swiglu_kernel(
    p_x, p_norm, p_weight, p_second, p_bias, p_second_bias, p_y, x_stride, weight_stride_n, weight_stride_k, M, K, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr, WHOLE_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_P rows of gate (the first N of the weight) and the same of up (behind them, or in a weight of its own)."""
    if PDL:
        o_n, m_n = pair_rows(tl.program_id(0), N, N, BLOCK_P)
        if p_second is not None:
            m_n = m_n & (o_n < N)  # of gate alone: what is no row of this weight is not fetched
        wait_for_previous_kernel(p_weight, o_n, m_n, weight_stride_n, weight_stride_k, K, BLOCK_K, NUM_STAGES)
    b_gate, b_up = project_pairs(
        p_x, p_norm, p_weight, p_second, p_bias, p_second_bias, 0, tl.program_id(0), tl.cast(N, tl.int64),
        x_stride, weight_stride_n, weight_stride_k, M, K, eps, BLOCK_M, BLOCK_P, BLOCK_K, EVEN_K, NUM_STAGES, INPUT_PRECISION, WHOLE_ROWS,
    )  # fmt: skip
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    tl.store(p_y + o_m * N + o_p, activate(b_gate, "silu") * b_up, mask=(o_p < N) & (o_m < M))


def plan_norm_swiglu(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *,
    up_weight: Tensor | None = None, up_bias: Tensor | None = None, eps: float, allow_tf32: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """y (M, N) from x (M, K), which has contiguous rows, and weight (2 * N, K), or two of (N, K) with equal strides.

    Triton's AMD backend (3.7) takes no tile whose rows have two bases: two weights are launches of their own there.
    """
    if up_weight is not None and not (gpu.is_nvidia or gpu.is_cpu):
        normed, gate, up = (t.new_empty(t.shape) for t in (x, y, y))
        rstd = x.new_empty(len(x), dtype=torch.float32)
        return [
            plan_rms_norm(x, norm_weight, normed, rstd, eps=eps, offset=0.0, gpu=gpu),
            *plan_linear(normed, weight, bias, None, gate, allow_tf32=allow_tf32, gpu=gpu),
            *plan_linear(normed, up_weight, up_bias, None, up, allow_tf32=allow_tf32, gpu=gpu),
            plan_glu(gate, up, y, activation="silu"),
        ]
    return plan_pairs(
        "norm_swiglu", norm_swiglu_kernel, 1, (y.shape[1],),
        dict(p_second=up_weight, p_bias=bias, p_second_bias=up_bias, p_y=y, N=y.shape[1]),
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
            for weight, up_weight in ((gate_up, None), (gate_up[:intermediate], gate_up[:intermediate])):
                for plan in plan_norm_swiglu(x, norm_weight, weight, None, y, up_weight=up_weight, eps=1e-5, gpu=gpu):
                    yield f"{m}x{hidden}x{intermediate}" + " apart" * (up_weight is not None), plan


def _kernel(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, up_weight: Tensor | None, up_bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    require_kernel_dtype(x=x)
    y = _fake(x, norm_weight, weight, bias, up_weight, up_bias, eps)
    if up_weight is not None and up_weight.stride() != weight.stride():
        weight, up_weight = weight.contiguous(), up_weight.contiguous()
    for plan in plan_norm_swiglu(
        as_rows(x), norm_weight.contiguous(), weight, contiguous(bias), y.flatten(0, -2), up_weight=up_weight,
        up_bias=contiguous(up_bias), eps=eps, allow_tf32=allow_tf32(x), gpu=gpu_of(x.device),
    ):  # fmt: skip
        plan.launch()
    return y


def _pytorch(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, up_weight: Tensor | None, up_bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    normed = rms_norm_op(x, norm_weight, eps, 0.0)[0]
    first = linear_op(normed, weight, bias, None, None)
    gate, up = first.chunk(2, -1) if up_weight is None else (first, linear_op(normed, up_weight, up_bias, None, None))
    return glu_op(gate, up, "silu")


def _fake(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, up_weight: Tensor | None, up_bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if up_weight is None else weight.shape[0]))


norm_swiglu_op = register(
    "norm_swiglu(Tensor x, Tensor norm_weight, Tensor gate_up_weight, Tensor? bias, Tensor? up_weight, Tensor? up_bias,"
    " float eps) -> Tensor",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.norm_swiglu,
    pytorch_is_faster=converts,
)  # fmt: skip


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, gate_up_weight: Tensor, bias: Tensor | None = None, *, eps: float,
    up_weight: Tensor | None = None, up_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """silu(gate) * up, where gate and up are projections of rms_norm(x): for the rows of a decoding step.

    Args:
        x: (..., hidden) with 1 to 16 rows (0 is allowed), float16, bfloat16 or float32 (float64 on the CPU).
        norm_weight: (hidden,), of x's dtype, like all tensors below.
        gate_up_weight: (2 * intermediate, hidden): the rows of gate, then up. With `up_weight` those of gate alone.
        bias: (2 * intermediate,), or None. With `up_weight` (intermediate,): of gate alone.
        eps: of the norm.
        up_weight: (intermediate, hidden), where gate and up are two matrices.
        up_bias: (intermediate,) where there is a `bias` too, else None.

    Returns:
        (..., intermediate), contiguous. On a GPU the bits of a row among 2 to 16 do not depend on the other rows; a row
        alone is added up in another order.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit, or there are more than 16 rows.
        RuntimeError: an input requires a gradient and grad mode is on: use the separate ops, or `torch.no_grad()`.
    """
    require_no_gradient("norm_swiglu", x, norm_weight, gate_up_weight, bias, up_weight, up_bias)
    return call(
        norm_swiglu_op, x, norm_weight, gate_up_weight, bias, up_weight, up_bias, eps,
        check=lambda: _check(x, norm_weight, gate_up_weight, bias, up_weight, up_bias),
    )  # fmt: skip


def _check(
    x: Tensor, norm_weight: Tensor, gate_up_weight: Tensor, bias: Tensor | None, up_weight: Tensor | None,
    up_bias: Tensor | None,
) -> None:  # fmt: skip
    others = {} if up_weight is None else {"up_weight": up_weight}
    require_norm_product(x, norm_weight, {"bias": bias, "up_bias": up_bias}, gate_up_weight=gate_up_weight, **others)
    if up_weight is not None:
        require_shape("up_weight", up_weight, gate_up_weight.shape)
    elif gate_up_weight.shape[0] % 2:
        raise ValueError(f"gate_up_weight must have an even number of rows, got {gate_up_weight.shape[0]}")
    if (up_bias is not None) != (bias is not None and up_weight is not None):
        raise ValueError("up_bias must be given where there are an up_weight and a bias, and nowhere else")
