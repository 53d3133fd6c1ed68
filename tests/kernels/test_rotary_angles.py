"""Rotary angles of tokens: parity, and whose bits they have."""

import pytest
import torch

from llama_fast.kernels import cpu
from llama_fast.kernels.rotary_angles import rotary_angles, rotary_angles_op
from tests.parity import assert_parity, not_interpreted, on_cpu, on_triton


@pytest.mark.parametrize("rotary_dim", [2, 20, 128])
@pytest.mark.parametrize("has_long", [False, True])
def test_rotary_angles_match_the_reference(rotary_dim, has_long, device):
    positions = torch.tensor([0, 1, 77, 4095, 131071], device=device)
    lengths = torch.tensor([1, 900, 4096, 4097, 131072], device=device)
    frequencies, long = (
        (base ** -(torch.arange(rotary_dim // 2, device=device) / rotary_dim * 2)).repeat(2) for base in (1e4, 5e5)
    )

    def exact(frequencies, long):
        chosen = torch.where(lengths[:, None] > 4096, long, frequencies) if has_long else frequencies
        angles = (positions[:, None].float() * chosen.float()).double()
        return angles.cos() * 1.25, angles.sin() * 1.25

    def ours(frequencies, long):
        return rotary_angles(positions, lengths, frequencies, long=long if has_long else None, limit=4096, scaling=1.25)

    def pytorch(frequencies, long):
        chosen = torch.where(lengths[:, None] > 4096, long, frequencies) if has_long else frequencies
        angles = positions[:, None].float() * chosen
        return angles.cos() * 1.25, angles.sin() * 1.25

    with torch.no_grad():
        assert_parity(ours, pytorch, exact, [frequencies, long], gradients=False)


@not_interpreted
def test_opcheck(device):
    positions, frequencies = torch.tensor([0, 2], device=device), torch.randn(8, device=device)
    torch.library.opcheck(rotary_angles_op, (positions, positions + 1, frequencies, None, 0, 1.0))


@on_cpu
@pytest.mark.skipif(not on_triton, reason="asks for what runs natively by name")
def test_angles_are_pytorchs_unless_kernels_are_asked_for_by_name(device):
    """transformers' bits: a head turned by another's cosine is as right, but compares worse."""
    positions, frequencies = torch.arange(5000, device=device), torch.rand(64, device=device)
    with cpu.use("auto"):
        cos, _ = rotary_angles(positions, positions, frequencies)
    assert torch.equal(cos, (positions[:, None].float() * frequencies).cos())
