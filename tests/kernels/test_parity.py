"""The error rule itself: what it measures, and what it never lets pass."""

import math

import pytest
import torch

from llama_fast.kernels.parity import error_bound, relative_error

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("actual", "reference", "error"),
    [
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([1.0, NAN, INF, -INF], [1.0, NAN, INF, -INF], 0.0),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, INF], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, 2.0], [1.0, INF], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, INF], [1.0, NAN], INF),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 2e-30], [0.0, 0.0], 2e270),
        ([], [], 0.0),
    ],
)
def test_relative_error(actual, reference, error):
    assert relative_error(torch.tensor(actual), torch.tensor(reference, dtype=torch.float64)) == pytest.approx(error)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"reference's shape, \(2,\), got \(1,\)"):
        relative_error(torch.ones(1), torch.ones(2))


@pytest.mark.parametrize("peer_error", [0.0, 1e-3, INF])
def test_a_lost_result_passes_beside_no_peer(peer_error):
    assert not relative_error(torch.tensor([NAN]), torch.tensor([1.0])) <= error_bound(peer_error, torch.float16)


def test_bound_is_twice_the_peer_and_one_eps():
    assert error_bound(0.25, torch.float32) == 0.5 + 2**-23
