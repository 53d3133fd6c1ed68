"""The two matrix products of a decoder layer that begin with RMSNorm, for the few rows of a decoding step. One launch each.

    norm_qkv_rope:  q, k, v = rms_norm(x) @ weight^T + bias; q and k turned by RoPE (half layout); k and v into the cache
    norm_swiglu:    gate, up = rms_norm(x) @ weight^T + bias; y = silu(gate) * up

x (M, K) with M up to 16, weight (N, K). The weight is all the traffic, 2NK bytes in bf16, and is read once. Its rows go in
pairs that are needed together: the two elements of a head that RoPE turns (elements of a head that it does not turn, and
those of v, are paired alike), or a row of gate and its row of up. A program owns BLOCK_P pairs, the rows of the first
elements above those of the second, and streams their 2 * BLOCK_P rows through a ring of NUM_STAGES asynchronous copies of 16
bytes a thread. One row of x is multiplied element by element, more go through the tensor cores with the weight as the left
operand, padded to 16 rows: the same binary for 2 to 16, so a row's bits depend on that row alone. One row alone adds up in
another order, and its bits differ from those it has among others.

The norm: every program reads all of x anyway, so it adds up x^2 along the way and scales the sums by rstd at the end.

    rms_norm(x) @ weight^T = rstd * ((x * norm_weight) @ weight^T)

For the tensor cores x * norm_weight is rounded once to the weight's dtype, where norm-then-round rounds x * rstd * norm_weight:
one rounding in either, of the same relative size, so the error rule holds (rstd, the bias, RoPE and SwiGLU are float32 here,
where the plain ops round between them). With one row nothing is rounded before the sum. In float16 x * norm_weight could
overflow where the normed row does not: there rows that need tensor cores are normed by a launch of their own.

Nothing is kept for a backward pass: inference only. Sources: arXiv:1910.07467 (RMSNorm), arXiv:2104.09864 (RoPE),
arXiv:2002.05202 (SwiGLU).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activation import activate
from .launch import Gpu, LaunchPlan, allow_tf32, as_rows, cdiv, gpu_of
from .library import register
from .linear import linear_op, require_dtype
from .matmul import FEW_ROWS
from .rms_norm import plan_rms_norm, rms_norm_op
from .rope import rope_op
from .streaming import streaming_stages, wait_for_previous_kernel
from .swiglu import glu_op
from .triton_compat import tl, triton
from .tuned import tuned_plan
from .validate import (
    require_floating,
    require_kernel_dtype,
    require_same,
    require_same_device,
    require_shape,
    require_tensors,
)


@triton.jit
def _pair_rows(i_block, pairs, half, BLOCK_P: tl.constexpr):
    """Rows of the i_block-th tile, counted from the first pair's: [2 * BLOCK_P], and which of them exist."""
    o_row = tl.arange(0, 2 * BLOCK_P)
    o_p = i_block.to(tl.int64) * BLOCK_P + o_row % BLOCK_P
    return o_p + (o_row // BLOCK_P).to(tl.int64) * half, o_p < pairs


@triton.jit
def _project_pairs(
    p_x, p_norm, p_weight, p_bias, o_n, m_n, x_stride, weight_stride_n, weight_stride_k, M, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """(norm(x) @ weight^T + bias)^T for the rows o_n of the weight: the first elements of the pairs, and the second ones.

    Both are [BLOCK_P, BLOCK_M] in float32. Without `p_norm` x is taken as it is.
    """
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    if BLOCK_M == 1:
        b_product = tl.zeros([2 * BLOCK_P, BLOCK_K], dtype=tl.float32)
        b_squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    else:
        b_acc = tl.zeros([2 * BLOCK_P, BLOCK_M], dtype=tl.float32)
        b_squares = tl.zeros([BLOCK_K, BLOCK_M], dtype=tl.float32)
        if p_norm is not None:  # loaded a tile ahead: 256 bytes are too few for a copy of 4 bytes a thread
            o_first = tl.arange(0, BLOCK_K)
            b_norm = tl.load(p_norm + o_first, mask=o_first < K, other=0.0)

    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        o_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        m_w = m_n[:, None]
        if not EVEN_K:
            m_w = m_w & m_k[None, :]
        p_w = p_weight + o_n[:, None] * weight_stride_n + o_k[None, :] * weight_stride_k
        b_w = tl.load(p_w, mask=m_w, other=0.0)  # [2 * BLOCK_P, BLOCK_K]
        if BLOCK_M == 1:
            b_x = tl.load(p_x + o_k, mask=m_k, other=0.0).to(tl.float32)
            if p_norm is not None:
                b_squares += b_x * b_x
                b_x *= tl.load(p_norm + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_product += b_w.to(tl.float32) * b_x[None, :]
        else:
            m_x = m_k[:, None] & (o_m < M)
            b_x = tl.load(p_x + o_k[:, None] + o_m * x_stride, mask=m_x, other=0.0)  # [BLOCK_K, BLOCK_M]
            if p_norm is not None:
                b_wide = b_x.to(tl.float32)
                b_squares += b_wide * b_wide
                b_x = (b_wide * b_norm.to(tl.float32)[:, None]).to(b_w.dtype)
                b_norm = tl.load(p_norm + o_k + BLOCK_K, mask=o_k + BLOCK_K < K, other=0.0)
            b_acc = tl.dot(b_w, b_x, b_acc, input_precision=INPUT_PRECISION)

    if BLOCK_M == 1:
        b_acc = tl.sum(b_product, axis=1, keep_dims=True)
    if p_norm is not None:
        b_acc *= tl.rsqrt(tl.sum(b_squares, axis=0) / K + eps)
    if p_bias is not None:
        b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    return tl.split(tl.permute(tl.reshape(b_acc, (2, BLOCK_P, BLOCK_M)), (1, 2, 0)))


# one binary for 2 to 16 rows, wherever a step's slots lie among its inputs
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["p_slots"])
def norm_qkv_rope_kernel(
    p_x, p_norm, p_weight, p_bias, p_cos, p_sin, p_q, p_k, p_v, p_slots,
    x_stride, weight_stride_n, weight_stride_k, angle_stride, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d, M, K, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_P pairs of a head's rows. HALF pairs are turned, the other HEAD_DIM - 2 * HALF rows are paired alike."""
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
    o_row, m_row = _pair_rows(i_block, pairs, pairs, BLOCK_P)
    o_n = i_head.to(tl.int64) * HEAD_DIM + first + o_row
    if PDL:
        wait_for_previous_kernel(p_weight, o_n, m_row, weight_stride_n, weight_stride_k, K, BLOCK_K, NUM_STAGES)

    # read before the product, or they would wait for memory after it
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    o_p = (i_block * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    mask = (o_p < pairs) & (o_m < M)
    m_angle = mask & (o_p < turned)
    b_cos = tl.load(p_cos + o_m * angle_stride + o_p, mask=m_angle, other=1.0).to(tl.float32)  # [BLOCK_P, BLOCK_M]
    b_sin = tl.load(p_sin + o_m * angle_stride + o_p, mask=m_angle, other=0.0).to(tl.float32)
    b_slot = tl.load(p_slots + o_m, mask=o_m < M, other=-1).to(tl.int32)  # 64 bits a slot would spill

    b_a, b_b = _project_pairs(
        p_x, p_norm, p_weight, p_bias, o_n, m_row, x_stride, weight_stride_n, weight_stride_k, M, K, eps,
        BLOCK_M, BLOCK_P, BLOCK_K, EVEN_K, NUM_STAGES, INPUT_PRECISION,
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


@triton.jit(do_not_specialize=["M"])
def norm_swiglu_kernel(
    p_x, p_norm, p_weight, p_bias, p_y, x_stride, weight_stride_n, weight_stride_k, M, K, N, eps,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_P rows of gate (the first N of the weight) and the same of up."""
    o_n, m_n = _pair_rows(tl.program_id(0), N, N, BLOCK_P)
    if PDL:
        wait_for_previous_kernel(p_weight, o_n, m_n, weight_stride_n, weight_stride_k, K, BLOCK_K, NUM_STAGES)
    b_gate, b_up = _project_pairs(
        p_x, p_norm, p_weight, p_bias, o_n, m_n, x_stride, weight_stride_n, weight_stride_k, M, K, eps,
        BLOCK_M, BLOCK_P, BLOCK_K, EVEN_K, NUM_STAGES, INPUT_PRECISION,
    )  # fmt: skip
    o_m = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    o_p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    tl.store(p_y + o_m * N + o_p, activate(b_gate, "silu") * b_up, mask=(o_p < N) & (o_m < M))


class Tile(NamedTuple):
    """A program's pairs of weight rows, and the bytes of a row in one stage."""

    block_p: int
    row_bytes: int


# One row: 8 KB of weight a stage either way; 32 float32 products a thread. x and norm_weight come from L2 in every program,
# two bytes for each two bytes of a weight row: 16 rows a program make that 1/8 of the traffic.
_ONE_ROW_TILES = (Tile(8, 512), Tile(4, 1024))

# 64 rows, which sm_90's own tensor core instruction takes, or 32. (Rows of 512 bytes took 255 registers and spilled.)
_TILES = (Tile(32, 256), Tile(16, 256))


def _plan_pairs(
    op: str, kernel: Any, groups: int, pairs: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any],
    weight: Tensor, x: Tensor, norm_weight: Tensor | None, *, eps: float, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """The launches for `groups` (heads) that have `pairs` of weight rows each, in sequences that share no tile."""
    m, k = x.shape
    plans = []
    if x.dtype == torch.float16 and m > 1 and norm_weight is not None:
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        rstd = x.new_empty(m, dtype=torch.float32)
        plans.append(plan_rms_norm(x, norm_weight, normed, rstd, eps=eps, offset=0.0, gpu=gpu))
        x, norm_weight = normed, None

    def programs(tile: Tile) -> int:
        return groups * sum(cdiv(length, tile.block_p) for length in pairs)

    tiles, wanted = (_ONE_ROW_TILES, 2) if m == 1 else (_TILES, 1)
    tile = next((tile for tile in tiles if programs(tile) >= wanted * gpu.multiprocessors), tiles[-1])
    block_m = 1 if m == 1 else FEW_ROWS
    stages = None
    if tuned := tuned_plan(op, gpu, x.dtype, (block_m, groups, sum(pairs), k)):
        tile, stages = Tile(tuned["block_p"], tuned["row_bytes"]), tuned["num_stages"]
    block_k = tile.row_bytes // x.element_size()
    plans.append(
        LaunchPlan(
            kernel,
            grid=(programs(tile),),
            arguments=arguments | dict(
                p_x=x, p_norm=norm_weight, p_weight=weight, x_stride=x.stride(0),
                weight_stride_n=weight.stride(0), weight_stride_k=weight.stride(1), M=m, K=k, eps=eps,
            ),
            constants=constants | dict(
                BLOCK_M=block_m, BLOCK_P=tile.block_p, BLOCK_K=block_k, EVEN_K=k % block_k == 0,
                PDL=gpu.has_pdl,
                NUM_STAGES=stages or streaming_stages(
                    programs(tile), 2 * tile.block_p * tile.row_bytes, max(2, block_m) * tile.row_bytes, gpu
                ),
            ),
            # float32 without TF32 has no tensor cores, and 4 warps spill
            num_warps=8 if m > 1 and constants["INPUT_PRECISION"] == "ieee" and x.element_size() == 4 else 4,
            pdl=gpu.has_pdl,
        )
    )  # fmt: skip
    return plans


def plan_norm_qkv_rope(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, q: Tensor, *, eps: float, allow_tf32: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """q (M, heads, 1, head_dim) and the caches at `slots`; x, cos and sin (of equal strides) have contiguous rows."""
    _, heads, _, head_dim = q.shape
    _, kv_heads, page, _ = k_cache.shape
    half = cos.shape[1] // 2
    k_stride_b, k_stride_h, k_stride_n, k_stride_d = k_cache.stride()
    v_stride_b, v_stride_h, v_stride_n, v_stride_d = v_cache.stride()
    arguments = dict(
        p_bias=bias, p_cos=cos, p_sin=sin, p_q=q, p_k=k_cache, p_v=v_cache, p_slots=slots, angle_stride=cos.stride(0),
        k_stride_b=k_stride_b, k_stride_h=k_stride_h, k_stride_n=k_stride_n, k_stride_d=k_stride_d,
        v_stride_b=v_stride_b, v_stride_h=v_stride_h, v_stride_n=v_stride_n, v_stride_d=v_stride_d,
    )  # fmt: skip
    constants = dict(
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF=half, PAGE=page,
        INPUT_PRECISION="tf32" if allow_tf32 else "ieee",
    )  # fmt: skip
    return _plan_pairs(
        "norm_qkv_rope", norm_qkv_rope_kernel, heads + 2 * kv_heads, (half, head_dim // 2 - half), arguments, constants,
        weight, x, norm_weight, eps=eps, gpu=gpu,
    )  # fmt: skip


def plan_norm_swiglu(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *,
    eps: float, allow_tf32: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """y (M, N) from x (M, K), which has contiguous rows, and weight (2 * N, K)."""
    arguments = dict(p_bias=bias, p_y=y, N=y.shape[1])
    constants = dict(INPUT_PRECISION="tf32" if allow_tf32 else "ieee")
    return _plan_pairs(
        "norm_swiglu",
        norm_swiglu_kernel,
        1,
        (y.shape[1],),
        arguments,
        constants,
        weight,
        x,
        norm_weight,
        eps=eps,
        gpu=gpu,
    )


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at the sizes of Llama-3.1-8B and 3.2-1B, as (shape, plan), for compilation ahead of time."""
    slots = torch.empty(16, dtype=torch.int64, device="meta")
    for m in (1, 4, 16):
        for hidden, intermediate, heads, head_dim in ((4096, 14336, 32, 128), (2048, 8192, 32, 64)):
            x, norm_weight, weight, gate_up, q, cache, y = (
                torch.empty(*shape, dtype=torch.bfloat16, device="meta")
                for shape in (
                    (m, hidden), (hidden,), ((heads + 16) * head_dim, hidden), (2 * intermediate, hidden),
                    (m, heads, 1, head_dim), (1024, 8, 16, head_dim), (m, intermediate),
                )
            )  # fmt: skip
            cos = torch.empty(m, head_dim, device="meta")
            for plan in plan_norm_qkv_rope(
                x, norm_weight, weight, None, cos, cos, cache, cache, slots[:m], q, eps=1e-5, gpu=gpu
            ):
                yield f"{m}x{hidden} {heads}/8x{head_dim}", plan
            for plan in plan_norm_swiglu(x, norm_weight, gate_up, None, y, eps=1e-5, gpu=gpu):
                yield f"{m}x{hidden}x{intermediate}", plan


def _qkv_kernel(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    require_kernel_dtype(x=x)
    q = _qkv_fake(x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots, eps, heads)
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    for plan in plan_norm_qkv_rope(
        as_rows(x), norm_weight.contiguous(), weight, None if bias is None else bias.contiguous(), cos, sin,
        k_cache, v_cache, slots.contiguous(), q, eps=eps, allow_tf32=allow_tf32(x), gpu=gpu_of(x.device),
    ):  # fmt: skip
        plan.launch()
    return q


def _swiglu_kernel(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    require_kernel_dtype(x=x)
    y = _swiglu_fake(x, norm_weight, weight, bias, eps)
    for plan in plan_norm_swiglu(
        as_rows(x), norm_weight.contiguous(), weight, None if bias is None else bias.contiguous(), y,
        eps=eps, allow_tf32=allow_tf32(x), gpu=gpu_of(x.device),
    ):  # fmt: skip
        plan.launch()
    return y


def _qkv_pytorch(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    _, kv_heads, page, head_dim = k_cache.shape
    qkv = linear_op(rms_norm_op(x, norm_weight, eps, 0.0)[0], weight, bias, None, None)
    q, k, v = qkv.view(x.shape[0], heads + 2 * kv_heads, 1, head_dim).split((heads, kv_heads, kv_heads), 1)
    q, k = rope_op(q, k, cos.unsqueeze(1), sin.unsqueeze(1), False, False)
    if (slots < 0).any():
        k, v, slots = (t[slots >= 0] for t in (k, v, slots))
    block, offset = slots // page, slots % page
    k_cache[block, :, offset], v_cache[block, :, offset] = k.squeeze(2), v.squeeze(2)
    return q.contiguous()


def _swiglu_pytorch(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    gate_up = linear_op(rms_norm_op(x, norm_weight, eps, 0.0)[0], weight, bias, None, None)
    return glu_op(*gate_up.chunk(2, 1), "silu")


def _qkv_fake(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], heads, 1, k_cache.shape[3]))


def _swiglu_fake(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


norm_qkv_rope_op = register(
    "norm_qkv_rope(Tensor x, Tensor norm_weight, Tensor qkv_weight, Tensor? qkv_bias, Tensor cos, Tensor sin,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, float eps, int heads) -> Tensor",
    kernel=_qkv_kernel, pytorch=_qkv_pytorch, fake=_qkv_fake,
)  # fmt: skip
norm_swiglu_op = register(
    "norm_swiglu(Tensor x, Tensor norm_weight, Tensor gate_up_weight, Tensor? bias, float eps) -> Tensor",
    kernel=_swiglu_kernel, pytorch=_swiglu_pytorch, fake=_swiglu_fake,
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
        ValueError: a shape or device does not fit, or there are more than 16 rows, or 2**31 slots.
        RuntimeError: an input requires a gradient and grad mode is on: use the separate ops, or `torch.no_grad()`.
    """
    _check_norm(
        "norm_qkv_rope", x, norm_weight, {"qkv_bias": qkv_bias}, qkv_weight=qkv_weight, k_cache=k_cache, v_cache=v_cache
    )
    require_floating(cos=cos, sin=sin)
    require_tensors(slots=slots)
    require_same(cos=cos, sin=sin)
    require_same_device(x=x, cos=cos, sin=sin, slots=slots)
    if k_cache.ndim != 4 or k_cache.shape[3] % 2 or 0 in k_cache.shape[1:]:
        raise ValueError(f"k_cache must be (blocks, kv_heads, block_size, even head_dim), got {tuple(k_cache.shape)}")
    require_shape("v_cache", v_cache, k_cache.shape)
    blocks, kv_heads, block_size, head_dim = k_cache.shape
    if blocks * block_size >= 2**31:  # the kernel counts them in 32 bits
        raise ValueError(f"k_cache must have fewer than 2**31 slots, got {blocks} blocks of {block_size}")
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a positive multiple of k_cache's {kv_heads} kv_heads, got {heads}")
    require_shape("qkv_weight", qkv_weight, ((heads + 2 * kv_heads) * head_dim, x.shape[1]))
    if cos.ndim != 2 or cos.shape[0] != x.shape[0] or cos.shape[1] % 2 or not 2 <= cos.shape[1] <= head_dim:
        raise ValueError(f"cos must be ({x.shape[0]}, even rotary_dim up to {head_dim}), got {tuple(cos.shape)}")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64, got {slots.dtype}")
    require_shape("slots", slots, x.shape[:1])
    return norm_qkv_rope_op(
        x, norm_weight, qkv_weight, qkv_bias, cos, sin, k_cache, v_cache, slots, eps, heads
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
    _check_norm("norm_swiglu", x, norm_weight, {"bias": bias}, gate_up_weight=gate_up_weight)
    if gate_up_weight.shape[0] % 2:
        raise ValueError(f"gate_up_weight must have an even number of rows, got {gate_up_weight.shape[0]}")
    return norm_swiglu_op(x, norm_weight, gate_up_weight, bias, eps)


def _check_norm(op: str, x: Tensor, norm_weight: Tensor, bias: dict[str, Tensor | None], **others: Tensor) -> None:
    """What both ops ask of x, the norm's weight, the bias by its name, and the others: the matrix first, then the caches."""
    biases = {name: tensor for name, tensor in bias.items() if tensor is not None}
    given = others | biases
    require_floating(x=x, norm_weight=norm_weight, **given)
    require_same_device(x=x, norm_weight=norm_weight, **given)
    require_dtype(x, norm_weight=norm_weight, **given)
    if x.ndim != 2 or x.shape[0] > FEW_ROWS or x.shape[1] == 0:
        raise ValueError(f"x must be (rows, hidden) with at most {FEW_ROWS} rows, got {tuple(x.shape)}")
    require_shape("norm_weight", norm_weight, x.shape[1:])
    name, weight = next(iter(others.items()))
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{name} must have shape (rows, {x.shape[1]}), got {tuple(weight.shape)}")
    for name, tensor in biases.items():
        require_shape(name, tensor, weight.shape[:1])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, norm_weight, *given.values())):
        raise RuntimeError(f"{op} has no gradient: use the separate ops, or call it under torch.no_grad()")
