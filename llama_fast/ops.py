"""The public functional API: every fused op, by name."""

from .kernels.rms_norm import rms_norm

__all__ = ["rms_norm"]
