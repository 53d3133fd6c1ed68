"""Finds the coefficients of `kernels/native/polynomials.py`: `python tests/kernels/native/fit_polynomials.py` prints them.

Each polynomial is the weighted least-squares fit at Chebyshev nodes, which is within a few per cent of the minimax
polynomial, in mpmath's 60 digits. The weight makes the error that of the function's result in ulp. Coefficients are rounded to
the element one by one, lowest first, and those above are fitted anew around each rounded one.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from mpmath import cos, erf, erfc, exp, expm1, log, log1p, lu_solve, matrix, mp, mpf, pi, sin, sqrt, tanh

mp.dps = 60
Function = Callable[[mpf], mpf]


@dataclass(frozen=True)
class Fit:
    """`function` on [low, high] to a polynomial of `degree` (float32, float64), errors multiplied by `weight`."""

    function: Function
    low: float
    high: float
    degree: tuple[int, int]
    weight: Function
    leading: float | None = None  # a lowest coefficient that is given, not fitted


def of_square(function: Function) -> Function:
    """g with function(x) = x + x * g(x * x)."""
    return lambda square: function(sqrt(square)) / sqrt(square) - 1


def relative(function: Function) -> Function:
    """The weight of such a g: its share in function(x)."""
    return lambda square: sqrt(square) / function(sqrt(square))


DOCSTRING = """Coefficients of the polynomials in math.py, lowest first, by name and element.

tests/kernels/native/fit_polynomials.py finds them, says of which function on which interval, and writes this file.
"""

FITS = {
    # the code makes 1 + x g(x) of it, so an error counts x / e^x; a little more than ln 2 / 2, as n is rounded from a product
    "exp": Fit(lambda x: expm1(x) / x, -0.3475, 0.3475, (5, 10), lambda x: x / exp(x)),
    "exp2": Fit(lambda x: expm1(x * log(2)) / x, -0.5, 0.5, (5, 10), lambda x: x / exp(x * log(2))),
    "log": Fit(lambda x: (log1p(x) - x) / x**2, -1 / 3, 1 / 3, (8, 19), lambda x: x**2 / log1p(x)),
    "log2": Fit(lambda x: (log1p(x) - x) / x**2 / log(2), -1 / 3, 1 / 3, (8, 19), lambda x: x**2 / log1p(x)),
    "sin": Fit(of_square(sin), 0.0, 1.58**2, (4, 8), relative(sin), leading=0.0),
    "tanh": Fit(of_square(tanh), 0.0, 0.625**2, (5, 11), relative(tanh), leading=0.0),
    "erf": Fit(of_square(erf), 0.0, 0.9**2, (5, 12), relative(erf)),
    "log erfc": Fit(lambda x: log(erfc(x)), 0.9, 6.0, (6, 18), erfc),
}


def rounded(value: mpf, element: str) -> float:
    return struct.unpack("f", struct.pack("f", float(value)))[0] if element == "f32" else float(value)


def coefficients(fit: Fit, element: str) -> list[float]:
    count = fit.degree[element == "f64"] + 1
    middle, half = mpf(fit.low + fit.high) / 2, mpf(fit.high - fit.low) / 2
    nodes = [middle + half * cos(pi * (2 * k + 1) / (8 * count)) for k in range(4 * count)]
    weights = [fit.weight(x) ** 2 for x in nodes]
    moments = [sum(w * x**k for w, x in zip(weights, nodes, strict=True)) for k in range(2 * count - 1)]
    targets = [w * fit.function(x) for w, x in zip(weights, nodes, strict=True)]
    right = [sum(t * x**k for t, x in zip(targets, nodes, strict=True)) for k in range(count)]
    found: list[float] = []
    for first in range(count):
        rest = range(first, count)
        if first == 0 and fit.leading is not None:
            found.append(fit.leading)
            continue
        gram = matrix([[moments[i + j] for j in rest] for i in rest])
        known = [right[i] - sum(moments[i + j] * c for j, c in enumerate(found)) for i in rest]
        found.append(rounded(lu_solve(gram, matrix(known))[0], element))
    return found


def worst(fit: Fit, found: list[float]) -> mpf:
    points = [fit.low + (fit.high - fit.low) * (mpf(k) + mpf(1) / 3) / 500 for k in range(500)]
    return max(abs(fit.weight(x) * (fit.function(x) - sum(c * x**k for k, c in enumerate(found)))) for x in points)


def table() -> str:
    """The text of polynomials.py."""
    lines = [f'"""{DOCSTRING}"""', "", "POLYNOMIALS = {"]
    for name, fit in FITS.items():
        lines.append(f'    "{name}": {{')
        for element in ("f32", "f64"):
            lines.append(f'        "{element}": (')
            lines += [f"            {coefficient!r}," for coefficient in coefficients(fit, element)]
            lines.append("        ),")
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    print(table(), end="")
