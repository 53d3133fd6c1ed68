"""RMSNorm, the q, k and v projections, RoPE, and k and v into the cache: for the rows of a decoding step, in one launch.

    q, k, v = rms_norm(x) @ weight^T + bias; q and k turned by RoPE (half layout); k and v into the cache

The norm, the product and what they cost are in `norm_matmul.py`. Sources: arXiv:1910.07467 (RMSNorm), arXiv:2104.09864
(RoPE).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import flops
from .cpu import converts
from .launch import Gpu, LaunchPlan, allow_tf32, as_rows, gpu_of
from .library import register
from .linear import linear_op
from .norm_matmul import pair_rows, plan_pairs, project_pairs, require_no_gradient, require_norm_product
from .paged_cache import append, require_cache, require_slots
from .rms_norm import rms_norm_op
from .rope import rope_op
from .streaming import wait_for_previous_kernel
from .triton_compat import tl, triton
from .validate import require_kernel_dtype, require_shape


# one binary for 2 to 16 rows, wherever a step's slots lie among its inputs
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["p_slots"])
def norm_qkv_rope_kernel(
    p_x, p_norm, p_weight, p_k_weight, p_v_weight, p_bias, p_k_bias, p_v_bias, p_cos, p_sin, p_q, p_k, p_v, p_slots,
    x_stride, weight_stride_n, weight_stride_k, angle_stride, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, M, K, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr, WHOLE_ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_P pairs of a head's rows. HALF pairs are turned, the other HEAD_DIM - 2 * HALF rows are paired alike.

    The weight has the rows of q, k and v, or those of q alone, where k and v have weights of their own with its strides. Without
    `p_slots` row i of x goes to slot i.
    """
    TURNED_BLOCKS: tl.constexpr = (HALF + BLOCK_P - 1) // BLOCK_P
    REST: tl.constexpr = HEAD_DIM // 2 - HALF
    HEAD_BLOCKS: tl.constexpr = TURNED_BLOCKS + (REST + BLOCK_P - 1) // BLOCK_P
    i_head = tl.program_id(0) // HEAD_BLOCKS
    i_block = tl.program_id(0) % HEAD_BLOCKS
    is_rest = i_block >= TURNED_BLOCKS
    turned = tl.where(is_rest | (i_head >= HEADS + KV_HEADS), 0, HALF)  # of the pairs
    i_block = tl.where(is_rest, i_block - TURNED_BLOCKS, i_block)
    pairs = tl.where(is_rest, REST, HALF).to(tl.int64)
    first = tl.where(is_rest, 2 * HALF, 0)
    i_in_weight = i_head
    if p_k_weight is not None:
        if i_head >= HEADS + KV_HEADS:
            p_weight = p_v_weight
            i_in_weight = i_head - HEADS - KV_HEADS
            if p_bias is not None:
                p_bias = p_v_bias
        elif i_head >= HEADS:
            p_weight = p_k_weight
            i_in_weight = i_head - HEADS
            if p_bias is not None:
                p_bias = p_k_bias
    first_row = i_in_weight.to(tl.int64) * HEAD_DIM + first
    if PDL:
        o_row, m_row = pair_rows(i_block, pairs, pairs, BLOCK_P)
        o_n = first_row + o_row
        wait_for_previous_kernel(p_weight, o_n, m_row, weight_stride_n, weight_stride_k, K, BLOCK_K, NUM_STAGES)

    # read before the product, or they would wait for memory after it
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    o_p = (i_block * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    mask = (o_p < pairs) & (o_m < M)
    m_angle = mask & (o_p < turned)
    b_cos = tl.load(p_cos + o_m * angle_stride + o_p, mask=m_angle, other=1.0).to(tl.float32)  # [BLOCK_P, BLOCK_M]
    b_sin = tl.load(p_sin + o_m * angle_stride + o_p, mask=m_angle, other=0.0).to(tl.float32)
    b_slot = o_m.to(tl.int32)
    if p_slots is not None:
        b_slot = tl.load(p_slots + o_m, mask=o_m < M, other=-1).to(tl.int32)  # 64 bits a slot would spill

    b_a, b_b = project_pairs(
        p_x, p_norm, p_weight, None, p_bias, None, first_row, i_block, pairs, x_stride, weight_stride_n,
        weight_stride_k, M, K, eps, BLOCK_M, BLOCK_P, BLOCK_K, EVEN_K, NUM_STAGES, INPUT_PRECISION, WHOLE_ROWS,
    )  # fmt: skip
    b_first = tl.where(m_angle, b_a * b_cos - b_b * b_sin, b_a)
    b_second = tl.where(m_angle, b_b * b_cos + b_a * b_sin, b_b)
    o_d = first + o_p.to(tl.int64)
    if i_head < HEADS:
        p_q_row = p_q + (o_m * HEADS + i_head) * HEAD_DIM + o_d
        tl.store(p_q_row, b_first, mask=mask)
        tl.store(p_q_row + pairs, b_second, mask=mask)
    else:
        i_kv = ((i_head - HEADS) % KV_HEADS).to(tl.int64)
        i_page = (b_slot // PAGE).to(tl.int64)
        i_entry = (b_slot % PAGE).to(tl.int64)
        mask = mask & (b_slot >= 0)
        if i_head < HEADS + KV_HEADS:
            p_k_row = p_k + i_page * k_stride_b + i_kv * k_stride_h + i_entry * k_stride_n + o_d * k_stride_d
            tl.store(p_k_row, b_first, mask=mask)
            tl.store(p_k_row + pairs * k_stride_d, b_second, mask=mask)
        else:
            p_v_row = p_v + i_page * v_stride_b + i_kv * v_stride_h + i_entry * v_stride_n + o_d * v_stride_d
            tl.store(p_v_row, b_first, mask=mask)
            tl.store(p_v_row + pairs * v_stride_d, b_second, mask=mask)


def plan_norm_qkv_rope(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor | None, q: Tensor, *,
    kv_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    kv_biases: tuple[Tensor | None, Tensor | None] = (None, None), eps: float, allow_tf32: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """q (M, heads, 1, head_dim) and the caches at `slots` (None: row i's is i); x, cos and sin (of equal strides) have contiguous rows.

    `weight` has the rows of q, k and v, or those of q, where `kv_weights` of its strides are given.
    """
    _, heads, _, head_dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    half = cos.shape[1] // 2
    k_stride_b, k_stride_h, k_stride_n, k_stride_d = k_cache.stride()
    v_stride_b, v_stride_h, v_stride_n, v_stride_d = v_cache.stride()
    arguments = dict(
        p_k_weight=kv_weights[0], p_v_weight=kv_weights[1], p_bias=bias, p_k_bias=kv_biases[0], p_v_bias=kv_biases[1],
        p_cos=cos, p_sin=sin, p_q=q, p_k=k_cache, p_v=v_cache, p_slots=slots, angle_stride=cos.stride(0),
        k_stride_b=k_stride_b, k_stride_h=k_stride_h, k_stride_n=k_stride_n, k_stride_d=k_stride_d,
        v_stride_b=v_stride_b, v_stride_h=v_stride_h, v_stride_n=v_stride_n, v_stride_d=v_stride_d,
    )  # fmt: skip
    constants = dict(
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=half, PAGE=page,
        INPUT_PRECISION="tf32" if allow_tf32 else "ieee",
    )  # fmt: skip
    return plan_pairs(
        "norm_qkv_rope", norm_qkv_rope_kernel, heads + 2 * kv_heads, (half, head_dim // 2 - half), arguments, constants,
        weight, x, norm_weight, eps=eps, gpu=gpu,
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at the sizes of Llama-3.1-8B and 3.2-1B, as (shape, plan), for compilation ahead of time."""
    slots = torch.empty(16, dtype=torch.int64, device="meta")
    for m in (1, 4, 16):
        for hidden, heads, head_dim in ((4096, 32, 128), (2048, 32, 64)):
            x, norm_weight, weight, q, cache = (
                torch.empty(*shape, dtype=torch.bfloat16, device="meta")
                for shape in (
                    (m, hidden), (hidden,), ((heads + 16) * head_dim, hidden), (m, heads, 1, head_dim),
                    (1024, 8, 16, head_dim),
                )
            )  # fmt: skip
            cos = torch.empty(m, head_dim, device="meta")
            for plan in plan_norm_qkv_rope(
                x, norm_weight, weight, None, cos, cos, cache, cache, slots[:m], q, eps=1e-5, gpu=gpu
            ):
                yield f"{m}x{hidden} {heads}/8x{head_dim}", plan


def _kernel(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    require_kernel_dtype(x=x)
    q = _fake(x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots, eps, heads)
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    for plan in plan_norm_qkv_rope(
        as_rows(x), norm_weight.contiguous(), weight, None if bias is None else bias.contiguous(), cos, sin,
        k_cache, v_cache, slots.contiguous(), q, eps=eps, allow_tf32=allow_tf32(x), gpu=gpu_of(x.device),
    ):  # fmt: skip
        plan.launch()
    return q


def _pytorch(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    _, kv_heads, _, head_dim = k_cache.shape
    qkv = linear_op(rms_norm_op(x, norm_weight, eps, 0.0)[0], weight, bias, None, None)
    q, k, v = qkv.view(x.shape[0], heads + 2 * kv_heads, 1, head_dim).split((heads, kv_heads, kv_heads), 1)
    q, k = rope_op(q, k, cos.unsqueeze(1), sin.unsqueeze(1), False, False)
    append(k.squeeze(2), v.squeeze(2), k_cache, v_cache, slots)
    return q.contiguous()


def _require_slots(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> None:  # fmt: skip
    require_slots(k_cache, slots)


def _fake(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], heads, 1, k_cache.shape[3]))


norm_qkv_rope_op = register(
    "norm_qkv_rope(Tensor x, Tensor norm_weight, Tensor qkv_weight, Tensor? qkv_bias, Tensor cos, Tensor sin,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, float eps, int heads) -> Tensor",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, flops=flops.norm_qkv_rope,
    pytorch_is_faster=converts, check=_require_slots,
)  # fmt: skip


def norm_qkv_rope(
    x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    """RMSNorm, the q, k and v projections, RoPE on q and k, and k and v into the cache: for the rows of a decoding step.

    Args:
        x: (rows, hidden) with 1 to 16 rows (0 is allowed), float16, bfloat16 or float32 (float64 on the CPU).
        norm_weight: (hidden,), of x's dtype, like all tensors below but cos, sin and slots.
        qkv_weight: ((heads + 2 * kv_heads) * head_dim, hidden): the rows of q, then k, then v.
        qkv_bias: ((heads + 2 * kv_heads) * head_dim,), or None.
        cos, sin: (rows, rotary_dim) of any floating-point dtype, each angle twice (in equal halves), as in transformers.
            rotary_dim is even and at most head_dim; elements past it are not turned.
        k_cache, v_cache: (blocks, kv_heads, block_size, head_dim) of any strides. Written at `slots`, nowhere else.
        slots: (rows,) int64, block * block_size + offset of each row, below blocks * block_size (not checked on a GPU).
            Two rows with one slot mix there. Nothing is written for one from -1 to -2**31: a row of padding.
        eps: of the norm.
        heads: of q.

    Returns:
        The turned q, (rows, heads, 1, head_dim), contiguous. On a GPU the bits of a row among 2 to 16 do not depend on the
        other rows; a row alone is added up in another order.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit, or there are more than 16 rows, or 2**31 slots; on the CPU, a slot
            past the cache.
        RuntimeError: an input requires a gradient and grad mode is on: use the separate ops, or `torch.no_grad()`.
    """
    if isinstance(x, Tensor) and x.ndim != 2:
        raise ValueError(f"x must be (rows, hidden), got {tuple(x.shape)}")
    require_norm_product(
        x, norm_weight, {"qkv_bias": qkv_bias}, qkv_weight=qkv_weight, k_cache=k_cache, v_cache=v_cache
    )
    require_no_gradient("norm_qkv_rope", x, norm_weight, qkv_weight, qkv_bias, k_cache, v_cache)
    if k_cache.ndim != 4 or k_cache.shape[3] % 2:
        raise ValueError(f"k_cache must be (blocks, kv_heads, block_size, even head_dim), got {tuple(k_cache.shape)}")
    require_cache(x, cos, sin, k_cache, v_cache, slots, heads)
    _, kv_heads, _, head_dim = k_cache.shape
    require_shape("qkv_weight", qkv_weight, ((heads + 2 * kv_heads) * head_dim, x.shape[1]))
    return norm_qkv_rope_op(
        x, norm_weight, qkv_weight, qkv_bias, cos, sin, k_cache, v_cache, slots, eps, heads
    )  # fmt: skip
