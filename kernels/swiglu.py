"""SwiGLU and GeGLU: the gated activation of an MLP.

    y = act(gate) * up          act = silu, gelu or gelu's tanh form (float32 inside, rounded once)

A program owns a tile of 2048 elements. Gate and up may be the two halves of one fused projection, `chunk(2, -1)`: rows
are addressed by their stride, nothing is copied. In bf16 4 bytes are read and 2 written an element, 6 and 4 in the
backward pass, for about 10 FLOPs: memory bound.

Kept for backward: gate and up. The activation is computed again from gate:

    dgate = dy * up * act'(gate)        dup = dy * act(gate)

Paper: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import activate, activation_and_slope
from .launch import Gpu, LaunchPlan, as_rows, cdiv, empty_contiguous, next_power_of_2
from .library import below_autograd, call, register, register_autograd
from .rows import accumulation_dtype, cast
from .triton_compat import tl, triton
from .validate import require_floating, require_kernel_dtype, require_same, require_same_device

TILE_COLUMNS = 1024
"""Longest tile row: 11008 columns (LLaMA-2 7B), which 2048 would cut into 5.4 tiles, leave 2 % of the last one idle."""


@triton.jit
def glu_kernel(
    p_gate, p_up, p_y, gate_stride, up_stride, M, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(N, BLOCK_N)
    o_m = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (o_m < M) & (o_n < N)

    b_gate = tl.load(p_gate + o_m * gate_stride + o_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    b_up = tl.load(p_up + o_m * up_stride + o_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + o_m * N + o_n, activate(b_gate, ACTIVATION) * b_up, mask=mask)


@triton.jit
def glu_backward_kernel(
    p_dy, p_gate, p_up, p_dgate, p_dup, dy_stride, gate_stride, up_stride, M, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(N, BLOCK_N)
    o_m = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (o_m < M) & (o_n < N)

    b_dy = tl.load(p_dy + o_m * dy_stride + o_n, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    b_gate = tl.load(p_gate + o_m * gate_stride + o_n, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + o_m * up_stride + o_n, mask=mask, other=0.0).to(tl.float32)
    b_act, b_slope = activation_and_slope(b_gate, ACTIVATION)
    tl.store(p_dgate + o_m * N + o_n, b_dy * b_up * b_slope, mask=mask)
    tl.store(p_dup + o_m * N + o_n, b_dy * b_act, mask=mask)


def plan_glu(gate: Tensor, up: Tensor, y: Tensor, *, activation: str) -> LaunchPlan:
    """Forward over rows (M, N); `gate` and `up` may have any row stride, `y` is contiguous."""
    arguments = dict(p_gate=gate, p_up=up, p_y=y, gate_stride=gate.stride(0), up_stride=up.stride(0))
    return _plan_tiles(glu_kernel, gate, arguments, activation)


def plan_glu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, *, activation: str
) -> LaunchPlan:
    """Backward over rows (M, N); `dy`, `gate` and `up` may have any row stride, `dgate` and `dup` are contiguous."""
    arguments = dict(
        p_dy=dy, p_gate=gate, p_up=up, p_dgate=dgate, p_dup=dup,
        dy_stride=dy.stride(0), gate_stride=gate.stride(0), up_stride=up.stride(0),
    )  # fmt: skip
    return _plan_tiles(glu_backward_kernel, gate, arguments, activation)


def _plan_tiles(kernel: Any, gate: Tensor, arguments: dict[str, Any], activation: str) -> LaunchPlan:
    m, n = gate.shape
    block_n = min(next_power_of_2(max(1, n)), TILE_COLUMNS)
    block_m = 2048 // block_n  # 16 elements a thread with 4 warps: two 16-byte loads of each input in bf16
    return LaunchPlan(
        kernel,
        grid=(cdiv(m, block_m) * cdiv(n, block_n),),
        arguments=arguments | dict(M=m, N=n),
        constants=dict(ACTIVATION=activation, BLOCK_M=block_m, BLOCK_N=block_n),
    )


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for activation in ("silu", "gelu_tanh"):
        m, n = 8192, 14336
        y, fused = (torch.empty(m, size, dtype=torch.bfloat16, device="meta") for size in (n, 2 * n))
        gate, up = fused.chunk(2, -1)
        yield f"{m}x{n} {activation}", plan_glu(gate, up, y, activation=activation)
        yield f"{m}x{n} {activation}", plan_glu_backward(y, gate, up, y, y, activation=activation)


def _kernel(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    require_kernel_dtype(gate=gate, up=up)
    y = empty_contiguous(gate)
    plan_glu(as_rows(gate), as_rows(up), y, activation=activation).launch()
    return y


def _backward_kernel(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _backward_fake(dy, gate, up, activation)
    plan_glu_backward(as_rows(dy), as_rows(gate), as_rows(up), dgate, dup, activation=activation).launch()
    return dgate, dup


def _pytorch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return cast(_act(cast(gate, accumulation_dtype(gate)), activation).mul_(up), gate.dtype).contiguous()


def _backward_pytorch(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    x = gate.to(accumulation_dtype(gate))
    d_act = dy * up.to(x.dtype)
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(d_act, x)
    else:
        dgate = torch.ops.aten.gelu_backward(d_act, x, approximate=_APPROXIMATE[activation])
    dup = dy * _act(x, activation)
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def _act(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate=_APPROXIMATE[activation])


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return empty_contiguous(gate)


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return empty_contiguous(gate), empty_contiguous(gate)


glu_op = register("glu(Tensor gate, Tensor up, str activation) -> Tensor", kernel=_kernel, pytorch=_pytorch, fake=_fake)
glu_backward_op = register(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
    kernel=_backward_kernel, pytorch=_backward_pytorch, fake=_backward_fake,
)  # fmt: skip


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return below_autograd(glu_op, gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *glu_backward_op(dy, *ctx.saved_tensors, ctx.activation), None


register_autograd(glu_op, _GLU)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in float32, rounded once.

    Args:
        gate: (..., intermediate), float16, bfloat16 or float32 (float64 on the CPU).
        up: like `gate`. Both may be the halves of one fused tensor, `gate_up.chunk(2, -1)`, without a copy.

    Returns:
        (..., intermediate), contiguous, of the same dtype.

    Raises:
        TypeError: a tensor is not floating point, or the two differ in dtype.
        ValueError: a shape or device does not fit.

    Source: arXiv:2002.05202.
    """
    return _glu(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """gelu(gate) * up, in float32, rounded once: Gemma's MLP (`gelu_pytorch_tanh`) with the default.

    Args:
        gate: (..., intermediate), float16, bfloat16 or float32 (float64 on the CPU).
        up: like `gate`. Both may be the halves of one fused tensor, `gate_up.chunk(2, -1)`, without a copy.
        approximate: "tanh" for the tanh form, "none" for the error function, as in `F.gelu`.

    Returns:
        (..., intermediate), contiguous, of the same dtype.

    Raises:
        TypeError: a tensor is not floating point, or the two differ in dtype.
        ValueError: a shape, device or `approximate` does not fit.

    Source: arXiv:2002.05202; GELU: arXiv:1606.08415.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
    return _glu(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    require_floating(gate=gate, up=up)
    require_same_device(gate=gate, up=up)
    require_same(gate=gate, up=up)
    if gate.ndim == 0:
        raise ValueError("gate must have at least one dimension, got a scalar")
    return call(glu_op, gate, up, activation)
