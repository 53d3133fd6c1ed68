"""Rotary position embedding of q and k, in one launch.

    half layout:         y[i] = x[i] c[i] - x[i + R/2] s[i]       y[i + R/2] = x[i + R/2] c[i] + x[i] s[i]      i < R/2
    interleaved layout:  y[2i] = x[2i] c[i] - x[2i + 1] s[i]      y[2i + 1] = x[2i + 1] c[i] + x[2i] s[i]
    the rest:            y[i] = x[i]                                                                            i >= R

in float32, rounded once; R = rotary_dim. Half is Llama's layout in transformers (`rotate_half`), interleaved GPT-J's and
Meta's own.

A program owns all heads of q or of k (4096 elements at most) of a few tokens, so that cos and sin are read once for all
of them. In bf16 2 bytes are read and 2 written an element, for 3 FLOPs: memory bound.

Kept for backward: cos and sin. The op turns each pair by an angle, and its derivative turns it back: the same kernel
with -sin.

Paper: Su et al., RoFormer, 2021 (arXiv:2104.09864).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .launch import Gpu, LaunchPlan, cdiv, next_power_of_2
from .library import below_autograd, call, register, register_autograd
from .rows import accumulation_dtype, cast
from .triton_compat import tl, triton
from .validate import require_floating, require_kernel_dtype, require_same, require_same_device

TILE_ELEMENTS = 4096
"""Elements of a program: 32 a thread with 4 warps, four 16-byte loads in bf16."""


@triton.jit
def _load_angles(
    p_row, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """One of the two equal cosines (or sines) of each pair: [BLOCK_S, 1, BLOCK_HALF]."""
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        b_angle = tl.load(p_row + o_d, mask=mask & (o_d < 2 * HALF), other=0.0)
        b_angle, _ = tl.split(tl.reshape(b_angle, [BLOCK_S, 1, BLOCK_HALF, 2]))
    else:
        o_d = tl.arange(0, BLOCK_HALF)[None, None, :]
        b_angle = tl.load(p_row + o_d, mask=mask & (o_d < HALF), other=0.0)
    return b_angle.to(tl.float32)


@triton.jit
def _rotate_heads(
    p_x, p_y, b_cos, b_sin, o_s, i_h, SEQ, HEADS, x_stride_h, x_stride_s, x_stride_d,
    y_stride_h, y_stride_s, y_stride_d, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The i_h-th block of heads of tokens `o_s` [BLOCK_S, 1, 1]; cos and sin are [BLOCK_S, 1, BLOCK_HALF]."""
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None].to(tl.int64)
    mask = (o_s < SEQ) & (o_h < HEADS)
    p_x += o_s * x_stride_s + o_h * x_stride_h  # [BLOCK_S, BLOCK_H, 1]
    p_y += o_s * y_stride_s + o_h * y_stride_h
    o_d = tl.arange(0, BLOCK_HALF)[None, None, :].to(tl.int64)
    if INTERLEAVED:
        # pairs are neighbours: they are loaded and stored as one, and split in registers
        o_pair = tl.arange(0, 2 * BLOCK_HALF)[None, None, :].to(tl.int64)
        m_pair = mask & (o_pair < 2 * HALF)
        b_x = tl.load(p_x + o_pair * x_stride_d, mask=m_pair, other=0.0).to(tl.float32)
        b_x = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], BLOCK_HALF, 2])
        b_a, b_b = tl.split(b_x)  # [BLOCK_S, BLOCK_H, BLOCK_HALF]
        b_y = tl.join(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin)
        tl.store(p_y + o_pair * y_stride_d, tl.reshape(b_y, [b_x.shape[0], b_x.shape[1], 2 * BLOCK_HALF]), mask=m_pair)
    else:
        m_half = mask & (o_d < HALF)
        b_a = tl.load(p_x + o_d * x_stride_d, mask=m_half, other=0.0).to(tl.float32)
        b_b = tl.load(p_x + (o_d + HALF) * x_stride_d, mask=m_half, other=0.0).to(tl.float32)
        tl.store(p_y + o_d * y_stride_d, b_a * b_cos - b_b * b_sin, mask=m_half)
        tl.store(p_y + (o_d + HALF) * y_stride_d, b_b * b_cos + b_a * b_sin, mask=m_half)
    if BLOCK_REST > 0:
        o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :].to(tl.int64)
        m_rest = mask & (o_rest < HEAD_DIM)
        tl.store(p_y + o_rest * y_stride_d, tl.load(p_x + o_rest * x_stride_d, mask=m_rest), mask=m_rest)


@triton.jit
def rope_kernel(
    p_q, p_k, p_cos, p_sin, p_q_out, p_k_out,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    q_out_stride_b, q_out_stride_h, q_out_stride_s, q_out_stride_d,
    k_out_stride_b, k_out_stride_h, k_out_stride_s, k_out_stride_d,
    angle_stride_b, angle_stride_s, SEQ, HEADS, KV_HEADS,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token_blocks = tl.cdiv(SEQ, BLOCK_S)
    i_b = (tl.program_id(0) // token_blocks).to(tl.int64)
    o_s = (tl.program_id(0) % token_blocks * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None]).to(tl.int64)

    p_cos += i_b * angle_stride_b + o_s * angle_stride_s  # [BLOCK_S, 1, 1]
    p_sin += i_b * angle_stride_b + o_s * angle_stride_s
    b_cos = _load_angles(p_cos, o_s < SEQ, HALF, INTERLEAVED, BLOCK_S, BLOCK_HALF)
    b_sin = _load_angles(p_sin, o_s < SEQ, HALF, INTERLEAVED, BLOCK_S, BLOCK_HALF)
    if CONJUGATE:
        b_sin = -b_sin

    head_blocks = tl.cdiv(HEADS, BLOCK_H)
    if tl.program_id(1) < head_blocks:
        _rotate_heads(
            p_q + i_b * q_stride_b, p_q_out + i_b * q_out_stride_b, b_cos, b_sin, o_s, tl.program_id(1), SEQ, HEADS,
            q_stride_h, q_stride_s, q_stride_d, q_out_stride_h, q_out_stride_s, q_out_stride_d,
            HEAD_DIM, HALF, INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            p_k + i_b * k_stride_b, p_k_out + i_b * k_out_stride_b, b_cos, b_sin, o_s, tl.program_id(1) - head_blocks,
            SEQ, KV_HEADS, k_stride_h, k_stride_s, k_stride_d, k_out_stride_h, k_out_stride_s, k_out_stride_d,
            HEAD_DIM, HALF, INTERLEAVED, BLOCK_KV_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def plan_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, *, interleaved: bool, conjugate: bool
) -> LaunchPlan:
    """Rotates `q` and `k` (batch, heads, seq, head_dim) into the outputs, all of any strides.

    `cos` and `sin` (batch or 1, seq, rotary_dim) have equal strides, and 1 as the last; `conjugate` turns back.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads = k.shape[1]
    angles, _, rotary_dim = cos.shape
    angle_stride_b, angle_stride_s, _ = cos.stride()
    tile = _tile(heads, kv_heads, min(seq, 4), head_dim, rotary_dim)
    arguments = dict(
        p_q=q, p_k=k, p_cos=cos, p_sin=sin, p_q_out=q_out, p_k_out=k_out,
        **dict(zip(_STRIDES, (*q.stride(), *k.stride(), *q_out.stride(), *k_out.stride()), strict=True)),
        angle_stride_b=0 if angles == 1 else angle_stride_b, angle_stride_s=angle_stride_s,
        SEQ=seq, HEADS=heads, KV_HEADS=kv_heads,
    )  # fmt: skip
    return LaunchPlan(
        rope_kernel,
        grid=(
            batch * cdiv(seq, tile["BLOCK_S"]),
            cdiv(heads, tile["BLOCK_H"]) + cdiv(kv_heads, tile["BLOCK_KV_H"]),
        ),
        arguments=arguments,
        constants=dict(tile, INTERLEAVED=interleaved, CONJUGATE=conjugate),
    )


_STRIDES = [f"{tensor}_stride_{dim}" for tensor in ("q", "k", "q_out", "k_out") for dim in "bhsd"]


@functools.lru_cache
def _tile(heads: int, kv_heads: int, most_tokens: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    block_half = next_power_of_2(rotary_dim // 2)
    most_heads = max(1, TILE_ELEMENTS // (2 * block_half))
    block_kv_h = min(next_power_of_2(max(1, kv_heads)), most_heads)
    # so many tokens that the few heads of k fill 16-byte accesses too; then so many heads of q that its tile is no larger
    block_s = min(next_power_of_2(max(1, most_tokens)), max(1, most_heads // (2 * block_kv_h)))
    block_h = min(next_power_of_2(max(1, heads)), max(1, most_heads // block_s))
    return dict(
        HEAD_DIM=head_dim, HALF=rotary_dim // 2,
        BLOCK_S=block_s, BLOCK_H=block_h, BLOCK_KV_H=block_kv_h, BLOCK_HALF=block_half,
        BLOCK_REST=next_power_of_2(head_dim - rotary_dim) if rotary_dim < head_dim else 0,
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for head_dim, interleaved, conjugate in (
        (64, False, False),
        (128, False, False),
        (128, False, True),
        (128, True, False),
    ):
        q, k = (
            torch.empty(2, 4096, heads, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
            for heads in (32, 8)
        )
        cos = torch.empty(1, 4096, head_dim, dtype=torch.bfloat16, device="meta")
        shape = f"2x32/8x4096x{head_dim}" + " interleaved" * interleaved + " backward" * conjugate
        yield shape, plan_rope(q, k, cos, cos, q, k, interleaved=interleaved, conjugate=conjugate)


def _kernel(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool
) -> tuple[Tensor, Tensor]:
    require_kernel_dtype(q=q, k=k, cos=cos, sin=sin)
    q_out, k_out = _fake(q, k, cos, sin, interleaved, conjugate)
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    plan_rope(q, k, cos, sin, q_out, k_out, interleaved=interleaved, conjugate=conjugate).launch()
    return q_out, k_out


def _pytorch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q)
    cos = cast(cos, dtype).unsqueeze(1)
    sin, _ = _pairs(cast(sin, dtype).unsqueeze(1), interleaved)
    sign = -1 if conjugate else 1
    return _rotate(q, cos, sin, interleaved, sign), _rotate(k, cos, sin, interleaved, sign)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    """`cos` stands twice for each pair, `sin` once. Few calls: for one token they cost more than the arithmetic."""
    h = cast(x, cos.dtype)
    y = torch.empty_like(h)
    h_turned, y_turned = h, y
    if cos.shape[-1] < x.shape[-1]:
        (h_turned, rest), (y_turned, y_rest) = (t.tensor_split((cos.shape[-1],), -1) for t in (h, y))
        y_rest.copy_(rest)
    torch.mul(h_turned, cos, out=y_turned)
    (a, b), (y_a, y_b) = _pairs(h_turned, interleaved), _pairs(y_turned, interleaved)
    y_a.addcmul_(b, sin, value=-sign)
    y_b.addcmul_(a, sin, value=sign)
    return cast(y, x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)  # in the memory order of each


rope_op = register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool conjugate) -> (Tensor, Tensor)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake,
)  # fmt: skip


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.conjugate = interleaved, conjugate
        return below_autograd(rope_op, q, k, cos, sin, interleaved, conjugate)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        # linear in q and k: the derivative is the op itself, which has a derivative, so this may be differentiated again
        dq, dk = rope_op(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.conjugate)
        return dq, dk, None, None, None, None


register_autograd(rope_op, _Rope)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates pairs of elements of each head of q and k by the angles of their positions, in float32, rounded once.

    Args:
        q: (batch, heads, seq, head_dim), float16, bfloat16 or float32 (float64 on the CPU), of any strides.
        k: (batch, kv_heads, seq, head_dim), of q's dtype, of any strides.
        cos: (batch or 1, seq, rotary_dim) or (seq, rotary_dim), of any floating-point dtype. rotary_dim is even and at
            most head_dim; the elements past it are copied. Each angle stands there twice, as in transformers: in the
            half layout as two equal halves, in the interleaved layout as equal neighbours.
        sin: like `cos`. Neither gets a gradient.
        interleaved: False pairs element i with i + rotary_dim / 2 (`rotate_half`), True pairs 2i with 2i + 1.

    Returns:
        The rotated (q, k), with the shapes and dtypes of the inputs, dense, with the dimensions in the inputs' order in
        memory: a transposed (batch, seq, heads, head_dim) tensor, as transformers makes, gives another one.

    Raises:
        TypeError: a tensor is not floating point, or the dtypes of q and k, or of cos and sin, differ.
        ValueError: a shape or device does not fit.

    Source: arXiv:2104.09864; transformers' `apply_rotary_pos_emb`.
    """
    require_floating(q=q, k=k, cos=cos, sin=sin)
    require_same_device(q=q, k=k, cos=cos, sin=sin)
    require_same(cos=cos, sin=sin)
    for name, tensor in (("q", q), ("k", k)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got {tuple(tensor.shape)}")
    batch, _, seq, head_dim = q.shape
    if k.shape != (batch, k.shape[1], seq, head_dim):
        raise ValueError(f"k must have q's batch, seq and head_dim, {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype, {q.dtype}, got {k.dtype}")
    if cos.ndim == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    require_angles(cos, batch, seq, head_dim)
    return call(rope_op, q, k, cos, sin, interleaved, False)


def require_angles(cos: Tensor, batch: int, seq: int, head_dim: int) -> None:
    if cos.ndim != 3:
        raise ValueError(f"cos must be (batch or 1, seq, rotary_dim) or (seq, rotary_dim), got {tuple(cos.shape)}")
    angles, positions, rotary_dim = cos.shape
    if angles not in (1, batch) or positions != seq:
        raise ValueError(f"cos must have batch {batch} or 1 and seq {seq} as q has, got {tuple(cos.shape)}")
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise ValueError(f"cos must have an even rotary_dim from 2 to head_dim {head_dim}, got {rotary_dim}")
