"""The public functional API: every fused op, by name."""

from .kernels.rms_norm import rms_norm
from .kernels.swiglu import geglu, swiglu

__all__ = ["geglu", "rms_norm", "swiglu"]
