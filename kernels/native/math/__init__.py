"""exp, log, tanh and their like in LLVM IR, for any number of lanes of float32 or float64.

Each function here is a formula over `Value`s (expressions.py), with polynomials of ours (polynomials.py). There are no branches
but the one in sin and cos, and no fast-math: infinities, NaN, -0 and denormals, as argument and as result, come out as C
says. A lane's result has the same bits at every width, and where nothing else is said on every CPU.

`definition("rsqrt", "f32", 16, AVX512)` gives

    define internal <16 x float> @lf.rsqrt.v16f32(<16 x float> %x) alwaysinline nounwind "min-legal-... {
    entry:
      %0 = call <16 x float> @llvm.sqrt.v16f32(<16 x float> %x)
      %1 = fdiv <16 x float> splat (float 0x3FF0000000000000), %0
      ret <16 x float> %1
    }

Errors are in ulp: distances to the next float. A result that is rounded right is within 0.5.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from ..machine import Machine
from .expressions import (
    ELEMENTS,
    Body,
    Element,
    Value,
    at_least,
    at_most,
    avx512,
    bits,
    fma,
    from_bits,
    magnitude,
    polynomial,
    rarely,
    square_root,
    where,
    with_sign_of,
)
from .polynomials import POLYNOMIALS

LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254120680009")
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
INFINITY = float("inf")


def definition(function: str, element: str, width: int, machine: Machine) -> str:
    """The LLVM IR that defines `@lf.<function>.v<width><element>` (`@lf.<function>.<element>` for one lane).

    `function` is a name in FUNCTIONS, `element` "f32" or "f64", `width` a power of two. The function takes and returns
    `<width x float>` (`float`) and is inlined wherever it is called. The text stands alone and may stand in a module beside
    any other definition; sin and cos bring a second function along.
    """
    body = Body(ELEMENTS[element], width, machine)
    return body.definition(function, FUNCTIONS[function](body.argument))


def exp(x: Value) -> Value:
    """e^x = 2^n e^r with n = rint(x / ln 2) and r = x - n ln 2: within 1 ulp. 12 instructions on AVX-512, 18 elsewhere.

    r takes two steps, of which the first is exact. AVX-512 gives 0 and infinity by itself for any n too small or too large;
    of r nothing is left there, not even a number, and `range` makes it one. Elsewhere x stays between what gives 0 and
    what gives infinity.
    """
    element = x.body.element
    if not x.body.has_avx512:
        x = at_least(at_most(x, float(element.top * LN2 // 1 + 1)), float(element.bottom * LN2 // 1))
    high, low = parts(LN2, element, 2)
    shifted = fma(x, float(1 / LN2), element.shift)
    n = shifted - element.shift
    r = fma(n, -low, fma(n, -high, x))
    if x.body.has_avx512:
        r = avx512("range", r, 0.5, immediate=0b0110)  # of the two the smaller in magnitude; 0.5 beside NaN
    return _times_power(fma(r, _polynomial("exp", r), 1.0), n, shifted)


def exp2(x: Value) -> Value:
    """2^x = 2^n 2^f with n = rint(x), as `exp`: within 1 ulp. 9 instructions on AVX-512, 17 elsewhere."""
    element = x.body.element
    if x.body.has_avx512:
        f = avx512("reduce", x, immediate=0)  # x - rint(x), and 0 for infinities
        shifted, n = x, x - f
    else:
        x = at_least(at_most(x, float(element.top)), float(element.bottom))
        shifted = x + element.shift
        n = shifted - element.shift
        f = x - n
    return _times_power(fma(f, _polynomial("exp2", f), 1.0), n, shifted)


def _times_power(x: Value, n: Value, shifted: Value) -> Value:
    """x 2^n for x near 1, where n stands in the lowest bits of `shifted` too; rounded once, denormal or not.

    One instruction on AVX-512. Elsewhere a product by 2^floor(n / 2), which is exact, and one by the rest: 2^n itself can
    be out of reach where x 2^n is not. `element.shift` has twice the bias in its lowest bits, so halves are exponents.
    """
    if x.body.has_avx512:
        return avx512("scalef", x, n)
    mantissa_bits = x.body.element.mantissa_bits
    half = bits(shifted) >> 1
    rest = bits(shifted) - half
    return x * from_bits(half << mantissa_bits) * from_bits(rest << mantissa_bits)


def log(x: Value) -> Value:
    """ln x = n ln 2 + ln m, within 1 ulp.

    ln m = r + r^2 p(r) with r = m - 1. The sum of n ln 2 (its high bits) and r loses what `lost` adds again.
    """
    m, n = _mantissa_and_exponent(x)
    element = x.body.element
    high = Fraction(round(LN2 * 2**element.exact_bits), 2**element.exact_bits)  # n * high is exact
    r, whole = m - 1.0, n * float(high)
    total = whole + r
    lost = r - (total - whole)
    return _log_of(x, total + fma(r * r, _polynomial("log", r), fma(n, float(LN2 - high), lost)))


def log2(x: Value) -> Value:
    """log2 x = n + log2 m, as `log`, within 1 ulp; exact for a power of two."""
    m, n = _mantissa_and_exponent(x)
    high, low = parts(1 / LN2, x.body.element, 2)
    r = m - 1.0
    linear = r * high
    total = n + linear
    lost = fma(r, low, fma(r, high, -linear)) + (linear - (total - n))
    return _log_of(x, total + fma(r * r, _polynomial("log2", r), lost))


def _mantissa_and_exponent(x: Value) -> tuple[Value, Value]:
    """m in [2/3, 4/3) and whole n with x = m 2^n, for a positive x, denormal too.

    2/3 of an exponent, added to the bits of x, carries into its exponent where the mantissa is 4/3 or more.
    """
    element = x.body.element
    scale, mantissa_bits = element.mantissa_bits + 1, element.mantissa_bits
    denormal = x < element.smallest_normal
    x = where(denormal, x * 2.0**scale, x)
    exponent = (bits(x) + (2 << mantissa_bits) // 3) >> mantissa_bits
    m = from_bits(bits(x) - (exponent << mantissa_bits) + (element.bias << mantissa_bits))
    unit = 2.0**mantissa_bits  # the number whose lowest bit is worth 1
    n = from_bits(exponent | (element.bias + mantissa_bits) << mantissa_bits)
    return m, n - where(denormal, unit + element.bias + scale, unit + element.bias)


def _log_of(x: Value, result: Value) -> Value:
    """`result` where x is positive and finite: infinity and NaN stay, 0 gives -infinity, less gives NaN."""
    result = where(x < INFINITY, result, x)
    result = where(x < 0.0, float("nan"), result)
    return where(x.equals(0.0), -INFINITY, result)


def erf(x: Value) -> Value:
    """x + x p(x^2) for |x| < 0.9, and 1 - e^q(|x|) beyond, q a polynomial for ln(1 - erf): within 1.1 ulp."""
    size = magnitude(x)
    near = fma(x, _polynomial("erf", x * x), x)
    far = 1.0 - exp(_polynomial("log erfc", at_most(size, 6.0)))
    return where(size < 0.9, near, with_sign_of(far, x))


def tanh(x: Value) -> Value:
    """x + x p(x^2) for |x| < 0.625, and 1 - 2 / (e^(2|x|) + 1) beyond: within 1.5 ulp."""
    size = magnitude(x)
    near = fma(x, _polynomial("tanh", x * x), x)
    far = 1.0 - 2.0 / (exp(size + size) + 1.0)
    return where(size < 0.625, near, with_sign_of(far, x))


def rsqrt(x: Value) -> Value:
    """1 / sqrt(x), both rounded right: within 1.5 ulp."""
    return 1.0 / square_root(x)


def sin(x: Value) -> Value:
    """(-1)^n sin(x - n pi) with n = rint(x / pi): within 2 ulp; libm's for |x| beyond 2^17 (2^30)."""
    element = x.body.element
    shifted = fma(x, float(1 / PI), element.shift)
    return _sine("sin", x, shifted - element.shift, shifted)


def cos(x: Value) -> Value:
    """(-1)^(n + 1) sin(x - (n + 1/2) pi) with n = rint(x / pi - 1/2): bounds as of `sin`."""
    element = x.body.element
    shifted = fma(x, float(1 / PI), -0.5) + (element.shift + 1.0)
    return _sine("cos", x, shifted - (element.shift + 1.0) + 0.5, shifted)


def _sine(function: str, x: Value, n: Value, shifted: Value) -> Value:
    """sin(x - n pi), negated where the lowest bit of `shifted` is set; libm's `function` of x where |x| is too large.

    The first of the three steps to r is exact. All parts of pi are positive, so -0 stays -0.
    """
    element = x.body.element
    r = x
    for part in parts(PI, element, 3):
        r = fma(n, -part, r)
    sine = at_least(at_most(fma(r, _polynomial("sin", r * r), r), 1.0), -1.0)  # it can be an ulp more
    result = from_bits(bits(sine) ^ bits(shifted) << element.bits - 1)
    return rarely(magnitude(x) > element.largest_angle, function, x, result)


def _polynomial(name: str, x: Value) -> Value:
    return polynomial(x, POLYNOMIALS[name][x.body.element.name])


def parts(number: Fraction, element: Element, count: int) -> list[float]:
    """A positive `number` as a sum of so many floats, each the rest of those before it, cut."""
    found = []
    for _ in range(count):
        _, exponent = math.frexp(float(number))
        unit = Fraction(2) ** (exponent - element.mantissa_bits - 1)
        found.append(float(number // unit * unit))
        number -= Fraction(found[-1])
    return found


FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    function.__name__: function for function in (exp, exp2, log, log2, erf, tanh, rsqrt, sin, cos)
}
