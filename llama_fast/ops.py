"""The public functional API: every fused op, by name."""

from .kernels.attention import attention
from .kernels.attention_decode import attention_decode
from .kernels.cross_entropy import cross_entropy
from .kernels.layer_norm import layer_norm
from .kernels.linear import linear
from .kernels.linear_cross_entropy import linear_cross_entropy
from .kernels.norm_qkv_rope import norm_qkv_rope
from .kernels.norm_swiglu import norm_swiglu
from .kernels.rms_norm import rms_norm
from .kernels.rope import rope
from .kernels.softmax import softmax
from .kernels.swiglu import geglu, swiglu

__all__ = [
    "attention",
    "attention_decode",
    "cross_entropy",
    "geglu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "norm_qkv_rope",
    "norm_swiglu",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
]
