"""The public functional API: every fused op, by name."""

from .kernels.attention_decode import attention_decode
from .kernels.layer_norm import layer_norm
from .kernels.rms_norm import rms_norm
from .kernels.rope import rope
from .kernels.swiglu import geglu, swiglu

__all__ = ["attention_decode", "geglu", "layer_norm", "rms_norm", "rope", "swiglu"]
