"""RoPE on q and k, with a norm of every head before it where a model has one, and k and v into the cache, in one launch.

    q, k = rms_norm(q) * q_norm, rms_norm(k) * k_norm          (Qwen3) each over its own head, float32, not rounded
    q, k turned by RoPE (half layout); k and v into the cache at the token's slot

What `norm_qkv_rope` does behind its product, for any number of tokens and for models whose heads are normalised. A program owns a
head of a token: it reads and writes each element once, memory bound. Separate ops are up to five launches.

Sources: arXiv:2104.09864 (RoPE); arXiv:2309.06180 (paged cache); arXiv:2302.05442 (norms of queries and keys).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import Gpu, LaunchPlan, as_rows, next_power_of_2
from .library import register
from .linear import require_dtype
from .paged_cache import append, require_cache, require_slots
from .rms_norm import rms_norm_op
from .rope import rope_op
from .rows import contiguous
from .triton_compat import tl, triton
from .validate import require_floating, require_kernel_dtype, require_same_device, require_shape


@triton.jit(do_not_specialize_on_alignment=["p_slots"])
def rope_append_kernel(
    p_qkv, p_q_norm, p_k_norm, p_cos, p_sin, p_q, p_k, p_v, p_slots, qkv_stride, angle_stride,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d, v_stride_b, v_stride_h, v_stride_n, v_stride_d, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i_token = tl.program_id(1).to(tl.int64)
    i_head = tl.program_id(0)
    is_q = i_head < HEADS
    is_v = i_head >= HEADS + KV_HEADS
    p_head = p_qkv + i_token * qkv_stride + i_head * HEAD_DIM
    o_half = tl.arange(0, BLOCK_HALF).to(tl.int64)
    m_half = o_half < HALF
    b_a = tl.load(p_head + o_half, mask=m_half, other=0.0).to(tl.float32)
    b_b = tl.load(p_head + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
    o_rest = 2 * HALF + tl.arange(0, BLOCK_REST).to(tl.int64)
    m_rest = o_rest < HEAD_DIM
    b_rest = tl.load(p_head + o_rest, mask=m_rest, other=0.0).to(tl.float32)
    if p_q_norm is not None:  # noqa: SIM102 (known when it is compiled, and the next is not)
        if not is_v:
            p_norm = p_q_norm
            if not is_q:
                p_norm = p_k_norm
            total = tl.sum(b_a * b_a + b_b * b_b, 0) + tl.sum(b_rest * b_rest, 0)
            rstd = 1.0 / tl.sqrt(total / HEAD_DIM + eps)
            b_a = b_a * rstd * tl.load(p_norm + o_half, mask=m_half, other=0.0).to(tl.float32)
            b_b = b_b * rstd * tl.load(p_norm + HALF + o_half, mask=m_half, other=0.0).to(tl.float32)
            b_rest = b_rest * rstd * tl.load(p_norm + o_rest, mask=m_rest, other=0.0).to(tl.float32)
    m_angle = m_half & (not is_v)
    b_cos = tl.load(p_cos + i_token * angle_stride + o_half, mask=m_angle, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + i_token * angle_stride + o_half, mask=m_angle, other=0.0).to(tl.float32)
    b_first = tl.where(is_v, b_a, b_a * b_cos - b_b * b_sin)
    b_second = tl.where(is_v, b_b, b_b * b_cos + b_a * b_sin)
    if is_q:
        p_y = p_q + (i_token * HEADS + i_head) * HEAD_DIM
        tl.store(p_y + o_half, b_first, mask=m_half)
        tl.store(p_y + HALF + o_half, b_second, mask=m_half)
        tl.store(p_y + o_rest, b_rest, mask=m_rest)
    else:
        slot = tl.load(p_slots + i_token).to(tl.int64)
        i_page = slot // PAGE
        i_entry = slot % PAGE
        i_kv = ((i_head - HEADS) % KV_HEADS).to(tl.int64)
        is_kept = slot >= 0
        if is_v:
            p_entry = p_v + i_page * v_stride_b + i_kv * v_stride_h + i_entry * v_stride_n
            tl.store(p_entry + o_half * v_stride_d, b_first, mask=m_half & is_kept)
            tl.store(p_entry + (HALF + o_half) * v_stride_d, b_second, mask=m_half & is_kept)
            tl.store(p_entry + o_rest * v_stride_d, b_rest, mask=m_rest & is_kept)
        else:
            p_entry = p_k + i_page * k_stride_b + i_kv * k_stride_h + i_entry * k_stride_n
            tl.store(p_entry + o_half * k_stride_d, b_first, mask=m_half & is_kept)
            tl.store(p_entry + (HALF + o_half) * k_stride_d, b_second, mask=m_half & is_kept)
            tl.store(p_entry + o_rest * k_stride_d, b_rest, mask=m_rest & is_kept)


def plan_rope_append(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, q: Tensor, *, eps: float,
) -> LaunchPlan:  # fmt: skip
    """q (tokens, heads, head_dim) and the caches at `slots`; qkv, cos and sin (of equal strides) have contiguous rows."""
    tokens, heads, head_dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    rotary_dim = cos.shape[1]
    k_stride_b, k_stride_h, k_stride_n, k_stride_d = k_cache.stride()
    v_stride_b, v_stride_h, v_stride_n, v_stride_d = v_cache.stride()
    return LaunchPlan(
        rope_append_kernel,
        grid=(heads + 2 * kv_heads, tokens),
        arguments=dict(
            p_qkv=qkv, p_q_norm=q_norm, p_k_norm=k_norm, p_cos=cos, p_sin=sin, p_q=q, p_k=k_cache, p_v=v_cache,
            p_slots=slots, qkv_stride=qkv.stride(0), angle_stride=cos.stride(0),
            k_stride_b=k_stride_b, k_stride_h=k_stride_h, k_stride_n=k_stride_n, k_stride_d=k_stride_d,
            v_stride_b=v_stride_b, v_stride_h=v_stride_h, v_stride_n=v_stride_n, v_stride_d=v_stride_d, eps=eps,
        ),
        constants=dict(
            HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=rotary_dim // 2, PAGE=page,
            BLOCK_HALF=next_power_of_2(rotary_dim // 2), BLOCK_REST=next_power_of_2(max(1, head_dim - rotary_dim)),
        ),
        num_warps=1,
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at the sizes of Qwen3-8B and of StableLM (partly turned heads), as (shape, plan), for compilation ahead of time."""
    for tokens, heads, head_dim, rotary_dim, normed in ((1, 32, 128, 128, True), (2048, 32, 80, 20, False)):
        qkv, norm, cache, q = (
            torch.empty(*shape, dtype=torch.bfloat16, device="meta")
            for shape in (
                (tokens, (heads + 16) * head_dim), (head_dim,), (1024, 8, 16, head_dim), (tokens, heads, head_dim),
            )
        )  # fmt: skip
        cos = torch.empty(tokens, rotary_dim, device="meta")
        slots = torch.empty(tokens, dtype=torch.int64, device="meta")
        weight = norm if normed else None
        yield (
            f"{tokens}x{heads}/8x{head_dim} turns {rotary_dim}" + " normed" * normed,
            plan_rope_append(qkv, weight, weight, cos, cos, cache, cache, slots, q, eps=1e-6),
        )


def _kernel(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, k_cache: Tensor,
    v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    require_kernel_dtype(qkv=qkv)
    q = _fake(qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, eps, heads)
    if not len(qkv):
        return q
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    plan_rope_append(
        as_rows(qkv), contiguous(q_norm), contiguous(k_norm), cos, sin, k_cache, v_cache, slots.contiguous(), q, eps=eps
    ).launch()
    return q


def _pytorch(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, k_cache: Tensor,
    v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    _, kv_heads, _, head_dim = k_cache.shape
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, 1, head_dim).split((heads, kv_heads, kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_op(q, q_norm, eps, 0.0)[0], rms_norm_op(k, k_norm, eps, 0.0)[0]
    q, k = rope_op(q, k, cos.unsqueeze(1), sin.unsqueeze(1), False, False)
    append(k.squeeze(2), v.squeeze(2), k_cache, v_cache, slots)
    return q.squeeze(2).contiguous()


def _require_slots(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, k_cache: Tensor,
    v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> None:  # fmt: skip
    require_slots(k_cache, slots)


def _fake(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, k_cache: Tensor,
    v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], heads, k_cache.shape[3]))


rope_append_op = register(
    "rope_append(Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, Tensor slots, float eps, int heads) -> Tensor",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, check=_require_slots,
)  # fmt: skip


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, heads: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """RoPE on q and k (behind an RMSNorm of each head, where there are weights of one), and k and v into the cache. Inference only.

    Args:
        qkv: (tokens, (heads + 2 * kv_heads) * head_dim): the heads of q, then k, then v; float16, bfloat16 or float32 (float64 on
            the CPU).
        cos, sin: (tokens, rotary_dim) of any floating-point dtype, each angle twice (in equal halves), as in transformers.
            rotary_dim is even and at most head_dim; elements past it are not turned.
        k_cache, v_cache: (blocks, kv_heads, block_size, head_dim) of qkv's dtype and any strides. Written at `slots`, nowhere else.
        slots: (tokens,) int64, block * block_size + offset of each token, below blocks * block_size (not checked on a GPU).
            Two tokens with one slot mix there. Nothing is written for a negative one.
        heads: of q.
        q_norm, k_norm: (head_dim,) of qkv's dtype, both or neither.
        eps: of the norms.

    Returns:
        The turned q, (tokens, heads, head_dim), contiguous.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape or device does not fit; on the CPU, a slot past the cache.
        RuntimeError: an input requires a gradient and grad mode is on: use the separate ops, or `torch.no_grad()`.
    """
    require_floating(qkv=qkv, k_cache=k_cache, v_cache=v_cache)
    require_same_device(qkv=qkv, k_cache=k_cache, v_cache=v_cache, q_norm=q_norm, k_norm=k_norm)
    require_cache(qkv, cos, sin, k_cache, v_cache, slots, heads)
    require_dtype(qkv, k_cache=k_cache, v_cache=v_cache, q_norm=q_norm, k_norm=k_norm)
    _, kv_heads, _, head_dim = k_cache.shape
    require_shape("qkv", qkv, (qkv.shape[0], (heads + 2 * kv_heads) * head_dim))
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must both be given, or neither")
    if q_norm is not None and k_norm is not None:
        require_shape("q_norm", q_norm, (head_dim,))
        require_shape("k_norm", k_norm, (head_dim,))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, q_norm, k_norm)):
        raise RuntimeError("rope_append has no gradient: use the separate ops, or call it under torch.no_grad()")
    q: Tensor = rope_append_op(qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, eps, heads)
    return q
