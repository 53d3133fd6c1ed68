"""The activations of fused epilogues, in float32 registers.

silu and gelu_tanh are both x * sigmoid(z(x)): gelu's 0.5 * (1 + tanh(z / 2)) is sigmoid(z).
"""

from .triton_compat import tl, triton


@triton.jit
def activate(b_x, ACTIVATION: tl.constexpr):
    """act(x) for "silu", "gelu" (error function), "gelu_tanh" or "relu"."""
    b_act, _ = activation_and_slope(b_x, ACTIVATION)
    return b_act


@triton.jit
def activation_slope(b_x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    _, b_slope = activation_and_slope(b_x, ACTIVATION)
    return b_slope


@triton.jit
def activation_and_slope(b_x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x), of which the compiler drops what is not used."""
    if ACTIVATION == "relu":
        b_act = tl.where(b_x < 0.0, 0.0, b_x)  # keeps NaN
        b_slope = tl.where(b_x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        b_cdf = 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476))
        b_act = b_x * b_cdf
        b_slope = b_cdf + b_x * 0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)
    else:
        if ACTIVATION == "gelu_tanh":
            b_z = 1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x)  # 2 sqrt(2 / pi)
            b_dz = 1.5957691216057308 * (1.0 + 0.134145 * b_x * b_x)
        else:
            tl.static_assert(ACTIVATION == "silu")
            b_z = b_x
            b_dz = 1.0
        b_exp = tl.exp(-b_z)
        b_sigmoid = 1.0 / (1.0 + b_exp)
        b_act = b_x * b_sigmoid
        # 1 - sigmoid(z) is rounded at 1: times x dz it was an error of 2e-6 in gelu_tanh's slope at x = 5
        b_rest = tl.where(b_z > 0.0, b_exp * b_sigmoid, 1.0 - b_sigmoid)
        b_slope = b_sigmoid + b_act * b_rest * b_dz
    return b_act, b_slope


@triton.jit
def tanh(b_x):
    """tanh(x), within one float32 eps.

    1 - 2 / (1 + e^2x) loses what is small: there it is the polynomial of Cephes' tanhf. And where x is negative 1 + e^2x is
    rounded at 1 (1.5 eps): it is minus that of -x.
    """
    b_square = b_x * b_x
    b_small = -5.70498872745e-3
    b_small = b_small * b_square + 2.06390887954e-2
    b_small = b_small * b_square - 5.37397155531e-2
    b_small = b_small * b_square + 1.33314422036e-1
    b_small = b_small * b_square - 3.33332819422e-1
    b_small = b_small * b_square * b_x + b_x
    b_large = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(b_x) * 2.8853900817779268))
    return tl.where(tl.abs(b_x) < 0.625, b_small, tl.where(b_x < 0.0, -b_large, b_large))
