"""The error rule, in one place: tests, benchmarks and `fuse` judge numbers by it.

Against the float64 reference the relative RMS error may be at most 2x (gradients 3x) that of PyTorch's own op in the same
dtype on the same input, plus one eps of the dtype.
"""

import torch
from torch import Tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """||actual - reference|| / ||reference|| in float64.

    Infinities and NaNs must stand in the same places (else inf); where the reference is all zero, so must `actual` be.
    """
    actual, reference = actual.detach().double(), reference.detach().double()
    if actual.shape != reference.shape:
        raise ValueError(f"actual must have the reference's shape, {tuple(reference.shape)}, got {tuple(actual.shape)}")
    finite = reference.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not torch.equal(actual[~finite], reference[~finite]):
        return float("inf")
    actual, reference = actual[finite], reference[finite]
    difference = torch.linalg.vector_norm(actual - reference).item()
    return 0.0 if difference == 0.0 else difference / (torch.linalg.vector_norm(reference).item() or 1e-300)


def error_bound(peer_error: float, dtype: torch.dtype, *, factor: float = OUTPUT_FACTOR) -> float:
    """The largest relative error that passes beside a peer's error in `dtype`."""
    return factor * peer_error + torch.finfo(dtype).eps
