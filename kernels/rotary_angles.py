"""The cosines and sines by which a step's tokens are turned, in one launch.

    cos, sin = cos(position * frequency) * scaling, sin(position * frequency) * scaling        each pair's twice, in halves

in float32, in the order of operations of transformers. Frequencies may be others for sequences longer than some length
(LongRoPE). A program owns one token. As separate ops these are six launches for some hundred numbers.

Sources: arXiv:2104.09864 (RoPE); arXiv:2402.13753 (LongRoPE).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import Gpu, LaunchPlan, next_power_of_2
from .library import register
from .triton_compat import tl, triton


@triton.jit
def rotary_angles_kernel(
    p_positions, p_lengths, p_frequencies, p_long, p_cos, p_sin, limit, scaling, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    i_token = tl.program_id(0).to(tl.int64)
    o_pair = tl.arange(0, BLOCK)
    m_pair = o_pair < HALF
    b_frequency = tl.load(p_frequencies + o_pair, mask=m_pair, other=0.0)
    if p_long is not None:
        b_long = tl.load(p_long + o_pair, mask=m_pair, other=0.0)
        b_frequency = tl.where(tl.load(p_lengths + i_token) > limit, b_long, b_frequency)
    b_angle = tl.load(p_positions + i_token).to(tl.float32) * b_frequency
    b_cos = tl.cos(b_angle) * scaling
    b_sin = tl.sin(b_angle) * scaling
    o_row = i_token * (2 * HALF) + o_pair
    tl.store(p_cos + o_row, b_cos, mask=m_pair)
    tl.store(p_cos + o_row + HALF, b_cos, mask=m_pair)
    tl.store(p_sin + o_row, b_sin, mask=m_pair)
    tl.store(p_sin + o_row + HALF, b_sin, mask=m_pair)


def plan_rotary_angles(
    positions: Tensor, lengths: Tensor, frequencies: Tensor, long: Tensor | None, cos: Tensor, sin: Tensor, *,
    limit: int, scaling: float,
) -> LaunchPlan:  # fmt: skip
    """cos, sin (tokens, rotary_dim) from contiguous positions and lengths; `frequencies` and `long` (rotary_dim,)."""
    tokens, rotary_dim = cos.shape
    return LaunchPlan(
        rotary_angles_kernel,
        grid=(tokens,),
        arguments=dict(
            p_positions=positions, p_lengths=lengths, p_frequencies=frequencies, p_long=long, p_cos=cos, p_sin=sin,
            limit=limit, scaling=scaling,
        ),
        constants=dict(HALF=rotary_dim // 2, BLOCK=next_power_of_2(rotary_dim // 2)),
        num_warps=1,
    )  # fmt: skip


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for tokens, rotary_dim, has_long in ((1, 128, False), (2048, 128, False), (16, 96, True)):
        positions = torch.empty(tokens, dtype=torch.int64, device="meta")
        frequencies = torch.empty(rotary_dim, device="meta")
        cos = torch.empty(tokens, rotary_dim, device="meta")
        plan = plan_rotary_angles(
            positions, positions, frequencies, frequencies if has_long else None, cos, cos, limit=4096, scaling=1.0
        )
        yield f"{tokens}x{rotary_dim}" + " long" * has_long, plan


def _kernel(
    positions: Tensor, lengths: Tensor, frequencies: Tensor, long: Tensor | None, limit: int, scaling: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cos, sin = _fake(positions, lengths, frequencies, long, limit, scaling)
    plan_rotary_angles(
        positions.contiguous(), lengths.contiguous(), frequencies.contiguous(), None if long is None else long.contiguous(),
        cos, sin, limit=limit, scaling=scaling,
    ).launch()  # fmt: skip
    return cos, sin


def _pytorch(
    positions: Tensor, lengths: Tensor, frequencies: Tensor, long: Tensor | None, limit: int, scaling: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if long is not None:
        frequencies = torch.where(lengths[:, None] > limit, long, frequencies)
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)


def _fake(
    positions: Tensor, lengths: Tensor, frequencies: Tensor, long: Tensor | None, limit: int, scaling: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (positions.shape[0], frequencies.shape[0])
    return frequencies.new_empty(shape), frequencies.new_empty(shape)


def _same_bits(*arguments: object) -> bool:
    """On a CPU PyTorch's own cosines have the bits of transformers': another's are right, too, and wanted where asked for by name."""
    return True


rotary_angles_op = register(
    "rotary_angles(Tensor positions, Tensor lengths, Tensor frequencies, Tensor? long, int limit, float scaling)"
    " -> (Tensor, Tensor)",
    kernel=_kernel, pytorch=_pytorch, fake=_fake, pytorch_is_faster=_same_bits,
)  # fmt: skip


def rotary_angles(
    positions: Tensor, lengths: Tensor, frequencies: Tensor, *, long: Tensor | None = None, limit: int = 0, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cos and sin of every token's angles, (tokens, rotary_dim) float32 each, contiguous.

    Args:
        positions: (tokens,) int64.
        lengths: (tokens,) int64, of each token's sequence; only read where there is `long`.
        frequencies: (rotary_dim,) float32, in two equal halves: radians a position.
        long: the same for sequences of more than `limit` tokens.
        scaling: a factor of both results.
    """
    cos, sin = rotary_angles_op(positions, lengths, frequencies, long, limit, scaling)
    return cos, sin
