"""What a decoder layer does behind its attention, as one op of three launches: for the rows of a decoding step.

    h = x + attended @ o^T + o_bias
    y = h + (silu(gate(n)) * up(n)) @ down^T + down_bias        n = rms_norm(h), gate and up projections of it

The kernels are those of `linear` and `norm_swiglu`. On a host that calls them one by one, a layer of a small model takes its time
between the calls: hidden 128, float32, one thread of a Xeon: 50 us in three ops, 25 in this one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import flops
from .cpu import converts
from .launch import allow_tf32, as_rows, gpu_of
from .library import call, register
from .linear import linear_op, require_dtype
from .matmul import plan_linear
from .norm_matmul import require_no_gradient, require_norm_product
from .norm_swiglu import norm_swiglu_op, plan_norm_swiglu
from .rows import contiguous
from .validate import require_kernel_dtype, require_same_device, require_shape


def _kernel(
    attended: Tensor, x: Tensor, o_weight: Tensor, o_bias: Tensor | None, norm_weight: Tensor, gate_weight: Tensor,
    up_weight: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    require_kernel_dtype(x=x)
    if up_weight is not None and up_weight.stride() != gate_weight.stride():
        gate_weight, up_weight = gate_weight.contiguous(), up_weight.contiguous()
    y = x.new_empty(x.shape)
    h = x.new_empty((x.numel() // x.shape[-1], x.shape[-1]))
    inner = x.new_empty((len(h), down_weight.shape[1]))
    where: Any = dict(gpu=gpu_of(x.device), allow_tf32=allow_tf32(x))
    for plan in (
        *plan_linear(as_rows(attended), o_weight, contiguous(o_bias), as_rows(x), h, **where),
        *plan_norm_swiglu(
            h, norm_weight.contiguous(), gate_weight, contiguous(gate_bias), inner, up_weight=up_weight,
            up_bias=contiguous(up_bias), eps=eps, **where,
        ),
        *plan_linear(inner, down_weight, contiguous(down_bias), h, y, **where),
    ):  # fmt: skip
        plan.launch()
    return y


def _pytorch(
    attended: Tensor, x: Tensor, o_weight: Tensor, o_bias: Tensor | None, norm_weight: Tensor, gate_weight: Tensor,
    up_weight: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    h = linear_op(attended, o_weight, o_bias, x, None)
    inner = norm_swiglu_op(h, norm_weight, gate_weight, gate_bias, up_weight, up_bias, eps)
    return linear_op(inner, down_weight, down_bias, h, None)


def _fake(attended: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


layer_tail_op = register(
    "layer_tail(Tensor attended, Tensor x, Tensor o_weight, Tensor? o_bias, Tensor norm_weight, Tensor gate_weight,"
    " Tensor? up_weight, Tensor? gate_bias, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, float eps) -> Tensor",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.layer_tail, pytorch_is_faster=converts,
)  # fmt: skip

Linear = tuple[Tensor, Tensor | None]
"""A weight (out_features, in_features), and a bias (out_features,) or None."""


def layer_tail(
    attended: Tensor,
    x: Tensor,
    output: Linear,
    norm_weight: Tensor,
    gate_up: Sequence[Linear],
    down: Linear,
    *,
    eps: float,
) -> Tensor:
    """h + mlp(rms_norm(h)), where h = x + output(attended) and mlp is SwiGLU's. Inference only.

    Args:
        attended: (..., heads * head_dim) with 1 to 16 rows, float16, bfloat16 or float32 (float64 on the CPU).
        x: (..., hidden) with as many, of `attended`'s dtype, like all tensors below.
        output: from heads * head_dim to hidden.
        norm_weight: (hidden,).
        gate_up: from hidden to intermediate, gate and up; or a single one with the rows of both. Both have a bias, or neither.
        down: from intermediate to hidden.
        eps: of the norm.

    Returns:
        Like `x`, contiguous.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit, or there are more than 16 rows.
        RuntimeError: an input requires a gradient and grad mode is on: use the separate ops, or `torch.no_grad()`.
    """
    (gate_weight, gate_bias), (up_weight, up_bias) = gate_up if len(gate_up) == 2 else (gate_up[0], (None, None))
    given = (attended, x, *output, norm_weight, gate_weight, up_weight, gate_bias, up_bias, *down)
    if torch.is_grad_enabled():
        require_no_gradient("layer_tail", *given)
    y: Tensor = call(layer_tail_op, *given, eps, check=lambda: _check(attended, x, output, norm_weight, gate_up, down))
    return y


def _check(
    attended: Tensor, x: Tensor, output: Linear, norm_weight: Tensor, gate_up: Sequence[Linear], down: Linear
) -> None:
    hidden, rows = x.shape[-1], len(gate_up[0][0])
    for i, (weight, bias) in enumerate(gate_up):
        require_norm_product(x, norm_weight, {f"gate_up[{i}][1]": bias}, **{f"gate_up[{i}][0]": weight})
        require_shape(f"gate_up[{i}][0]", weight, (rows, hidden))
        if (bias is None) != (gate_up[0][1] is None):
            raise ValueError("gate_up must have two biases, or none")
    if len(gate_up) == 1 and rows % 2:
        raise ValueError(f"gate_up[0][0] must have an even number of rows, got {rows}")
    intermediate = rows // 2 if len(gate_up) == 1 else rows
    (o_weight, o_bias), (down_weight, down_bias) = output, down
    require_shape("attended", attended, (*x.shape[:-1], o_weight.shape[-1]))
    require_shape("output[0]", o_weight, (hidden, attended.shape[-1]))
    require_shape("down[0]", down_weight, (hidden, intermediate))
    for name, bias in (("output[1]", o_bias), ("down[1]", down_bias)):
        if bias is not None:
            require_shape(name, bias, (hidden,))
    others = {
        "attended": attended,
        "output[0]": o_weight,
        "output[1]": o_bias,
        "down[0]": down_weight,
        "down[1]": down_bias,
    }
    require_same_device(x=x, **others)
    require_dtype(x, **others)
