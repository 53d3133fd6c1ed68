"""The matrix product of every kernel: `tl.dot`, right in Triton's interpreter too."""

from .launch import INTERPRETED
from .triton_compat import tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(b_a, b_b, b_acc, INPUT_PRECISION: tl.constexpr):
    """b_a @ b_b + b_acc, in float32; `b_acc` may be None.

    Triton's interpreter (3.6 to 3.9) multiplies the raw bits of bfloat16; there the operands are float32 first, which holds
    each of their products as a tensor core does.
    """
    if _INTERPRETED:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision=INPUT_PRECISION)
