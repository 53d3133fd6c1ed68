"""The error rule, in one place: tests, benchmarks and `fuse` judge numbers by it.

Against the float64 reference the relative RMS error may be at most 2x (gradients 3x) that of PyTorch's own op in the same
dtype on the same input, plus one eps of the dtype.
"""

import sys

import torch
from torch import Tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """||actual - reference|| / ||reference|| in float64.

    Infinities and NaNs must be the reference's, each in its place: one too many, too few or of the wrong kind makes the
    error inf. Where the reference is all zero, ||reference|| counts as 1e-300: an error beside a peer's keeps its meaning.
    """
    actual, reference = actual.detach().double(), reference.detach().double()
    if actual.shape != reference.shape:
        raise ValueError(f"actual must have the reference's shape, {tuple(reference.shape)}, got {tuple(actual.shape)}")
    finite = reference.isfinite()
    if not torch.allclose(actual[~finite], reference[~finite], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    actual, reference = actual[finite], reference[finite]
    if not actual.isfinite().all():
        return float("inf")
    difference, norm = (torch.linalg.vector_norm(x).item() for x in (actual - reference, reference))
    return difference / (norm or 1e-300)


def error_bound(peer_error: float, dtype: torch.dtype, *, factor: float = OUTPUT_FACTOR) -> float:
    """The largest relative error that passes beside a peer's error in `dtype`: finite, so that an error of inf never does."""
    return min(factor * peer_error + torch.finfo(dtype).eps, sys.float_info.max)
