"""RMSNorm, the q, k and v projections, and RoPE: `norm_qkv_rope` with keys and values as results, for whoever keeps them otherwise.

Its kernel, with a cache of one entry a row. Here q, k and v may be projected by three matrices, as transformers has them: a program
owns rows of one head, and takes the matrix that has them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import flops
from .cpu import converts
from .launch import Gpu, LaunchPlan, allow_tf32, as_rows, gpu_of
from .library import call, register
from .linear import linear_op
from .norm_matmul import require_no_gradient, require_norm_product
from .norm_qkv_rope import plan_norm_qkv_rope
from .rms_norm import rms_norm_op
from .rope import require_angles, rope_op
from .rows import contiguous
from .validate import require_floating, require_kernel_dtype, require_same, require_same_device, require_shape


def _has_kernel(gpu: Gpu) -> bool:
    """Triton 3.6's back end for AMD fails on a kernel that chooses between matrices: there it is the separate ops."""
    return gpu.is_nvidia or gpu.is_cpu


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at the sizes of Llama-3.1-8B and 3.2-1B, as (shape, plan), for compilation ahead of time."""
    for m in (1, 4, 16) if _has_kernel(gpu) else ():
        for hidden, heads, head_dim in ((4096, 32, 128), (2048, 32, 64)):
            x, norm_weight, q_weight, kv_weight, q, kv = (
                torch.empty(*shape, dtype=torch.bfloat16, device="meta")
                for shape in (
                    (m, hidden), (hidden,), (heads * head_dim, hidden), (8 * head_dim, hidden), (m, heads, 1, head_dim),
                    (m, 8, 1, head_dim),
                )
            )  # fmt: skip
            cos = torch.empty(m, head_dim, device="meta")
            for plan in plan_norm_qkv_rope(
                x,
                norm_weight,
                q_weight,
                None,
                cos,
                cos,
                kv,
                kv,
                None,
                q,
                kv_weights=(kv_weight, kv_weight),
                eps=1e-5,
                gpu=gpu,
            ):
                yield f"{m}x{hidden} {heads}/8x{head_dim}", plan


def _kernel(
    x: Tensor, norm_weight: Tensor, q_weight: Tensor, k_weight: Tensor | None, v_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, cos: Tensor, sin: Tensor, eps: float, heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    require_kernel_dtype(x=x)
    gpu = gpu_of(x.device)
    if not _has_kernel(gpu):
        return _pytorch(
            x, norm_weight, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, cos, sin, eps, heads, kv_heads
        )
    q, k, v = _fake(
        x, norm_weight, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, cos, sin, eps, heads, kv_heads
    )
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    if (
        k_weight is not None
        and v_weight is not None
        and not q_weight.stride() == k_weight.stride() == v_weight.stride()
    ):
        q_weight, k_weight, v_weight = q_weight.contiguous(), k_weight.contiguous(), v_weight.contiguous()
    for plan in plan_norm_qkv_rope(
        as_rows(x), norm_weight.contiguous(), q_weight, contiguous(q_bias), _by_row(cos, x), _by_row(sin, x),
        _by_row(k.transpose(1, 2), x)[:, :, None], _by_row(v.transpose(1, 2), x)[:, :, None], None, _by_row(q.transpose(1, 2), x)[:, :, None],
        kv_weights=(k_weight, v_weight), kv_biases=(contiguous(k_bias), contiguous(v_bias)), eps=eps,
        allow_tf32=allow_tf32(x), gpu=gpu,
    ):  # fmt: skip
        plan.launch()
    return q, k, v


def _by_row(y: Tensor, x: Tensor) -> Tensor:
    """y (batch or 1, seq, ...) for each row of x (batch, seq, hidden): (batch * seq, ...), a view where it can be one."""
    return y.expand(x.shape[0], *y.shape[1:]).flatten(0, 1)


def _pytorch(
    x: Tensor, norm_weight: Tensor, q_weight: Tensor, k_weight: Tensor | None, v_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, cos: Tensor, sin: Tensor, eps: float, heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed = rms_norm_op(x, norm_weight, eps, 0.0)[0]
    given = ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
    projected = [linear_op(normed, weight, bias, None, None) for weight, bias in given if weight is not None]
    rows = projected[0] if k_weight is None else torch.cat(projected, -1)
    q, k, v = rows.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    q, k = rope_op(q, k, cos, sin, False, False)
    made = _fake(x, norm_weight, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, cos, sin, eps, heads, kv_heads)
    return made[0].copy_(q), made[1].copy_(k), made[2].copy_(v)


def _fake(
    x: Tensor, norm_weight: Tensor, q_weight: Tensor, k_weight: Tensor | None, v_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, v_bias: Tensor | None, cos: Tensor, sin: Tensor, eps: float, heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, seq, _ = x.shape
    head_dim = q_weight.shape[0] // (heads + 2 * kv_heads if k_weight is None else heads)
    if seq == 1:  # the same memory, without a view
        return (
            x.new_empty((batch, heads, 1, head_dim)),
            x.new_empty((batch, kv_heads, 1, head_dim)),
            x.new_empty((batch, kv_heads, 1, head_dim)),
        )
    return (
        x.new_empty((batch, seq, heads, head_dim)).transpose(1, 2),
        x.new_empty((batch, seq, kv_heads, head_dim)).transpose(1, 2),
        x.new_empty((batch, seq, kv_heads, head_dim)).transpose(1, 2),
    )


norm_heads_op = register(
    "norm_heads(Tensor x, Tensor norm_weight, Tensor q_weight, Tensor? k_weight, Tensor? v_weight, Tensor? q_bias,"
    " Tensor? k_bias, Tensor? v_bias, Tensor cos, Tensor sin, float eps, int heads, int kv_heads)"
    " -> (Tensor q, Tensor k, Tensor v)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.norm_heads,
    pytorch_is_faster=converts,
)  # fmt: skip


def norm_heads(
    x: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], cos: Tensor, sin: Tensor, *,
    eps: float, heads: int, kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Heads of q and k, turned by RoPE, and of v, of rms_norm(x): for the rows of a decoding step. Inference only.

    Args:
        x: (batch, seq, hidden) with 1 to 16 rows together (0 is allowed), float16, bfloat16 or float32 (float64 on the CPU).
        norm_weight: (hidden,), of x's dtype, like all tensors below but cos and sin.
        weights: the matrices of q, k and v, each (its heads * head_dim, hidden); or a single one with the rows of all three. head_dim
            is even.
        biases: as many, all tensors (rows of the matrix,) or all None.
        cos, sin: (batch or 1, seq, rotary_dim) of any floating-point dtype, each angle twice (in equal halves), as in transformers.
            rotary_dim is even and at most head_dim; elements past it are not turned.
        eps: of the norm.
        heads, kv_heads: of q, and of k and v.

    Returns:
        q (batch, heads, seq, head_dim), and k and v (batch, kv_heads, seq, head_dim), in memory token by token. On a GPU the bits of a row among 2 to 16
        do not depend on the other rows; a row alone is added up in another order.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit, or there are more than 16 rows.
        RuntimeError: an input requires a gradient and grad mode is on: use the separate ops, or `torch.no_grad()`.
    """
    if len(weights) not in (1, 3) or len(biases) != len(weights):
        raise ValueError(f"weights and biases must be one or three each, got {len(weights)} and {len(biases)}")
    require_no_gradient("norm_heads", x, norm_weight, *weights, *biases)
    q_weight, k_weight, v_weight = weights if len(weights) == 3 else (*weights, None, None)
    q_bias, k_bias, v_bias = biases if len(biases) == 3 else (*biases, None, None)
    q, k, v = call(
        norm_heads_op, x, norm_weight, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, cos, sin, eps, heads, kv_heads,
        check=lambda: _check(x, norm_weight, weights, biases, cos, sin, heads, kv_heads),
    )  # fmt: skip
    return q, k, v


def _check(
    x: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], cos: Tensor, sin: Tensor,
    heads: int, kv_heads: int,
) -> None:  # fmt: skip
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a positive multiple of kv_heads, got {heads} and {kv_heads}")
    if len({bias is None for bias in biases}) > 1:
        raise ValueError("biases must be tensors, or None, all of them")
    all_heads = (heads, kv_heads, kv_heads) if len(weights) == 3 else (heads + 2 * kv_heads,)
    for i, (weight, bias, count) in enumerate(zip(weights, biases, all_heads, strict=True)):
        weight_name, bias_name = f"weights[{i}]", f"biases[{i}]"
        require_norm_product(x, norm_weight, {bias_name: bias}, **{weight_name: weight})
        head_dim = weights[0].shape[0] // all_heads[0]
        require_shape(weight_name, weight, (count * head_dim, x.shape[-1]))
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"weights must have an even head_dim, got {weights[0].shape[0]} rows for {all_heads[0]} heads")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, seq, hidden), got {tuple(x.shape)}")
    require_floating(cos=cos, sin=sin)
    require_same(cos=cos, sin=sin)
    require_same_device(x=x, cos=cos, sin=sin)
    require_angles(cos, x.shape[0], x.shape[1], head_dim)
