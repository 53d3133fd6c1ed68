"""Figures for readers: three significant digits, and the unit that suits the size."""

from collections.abc import Sequence

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SPANS = ((3599.5, 60, 1, ("min", "s")), (86370.0, 3600, 60, ("h", "min")), (float("inf"), 86400, 3600, ("d", "h")))
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def number(value: float, digits: int = 3) -> str:
    """Rounded to `digits` significant digits, written out: 0.0123, 1.23, 123, 12,300."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".partition("e")[2])
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def duration(seconds: float, digits: int = 3) -> str:
    """1.23 ms, 45.6 µs."""
    scale, unit = _unit(seconds, _SECONDS, digits)
    return f"{number(seconds / scale, digits)} {unit}"


def span(seconds: float) -> str:
    """What people wait: 2 d 3 h, 1 h 40 min, 3 min 20 s, 12 s, 0.4 s."""
    if seconds < 59.5:
        return f"{number(seconds, 1 + (seconds >= 9.5))} s"
    _, large, small, names = next(each for each in _SPANS if seconds < each[0])
    whole, rest = divmod(round(seconds / small), large // small)
    return f"{whole:,} {names[0]}" + (f" {rest} {names[1]}" if rest else "")


def size(count: float) -> str:
    """Bytes in powers of ten, as bandwidths are: 2.47 GB."""
    return _prefixed(count, "B")


def flops(count: float) -> str:
    """2.47 GFLOP."""
    return _prefixed(count, "FLOP")


def tokens(count: int) -> str:
    """Lengths as they are typed: 512, 1k, 32k, 128k; 1,000 where it is no multiple of 1024."""
    return f"{count // 1024}k" if count and count % 1024 == 0 else f"{count:,}"


def percent(share: float) -> str:
    """12.3 %, 0.4 %, 87 %."""
    value = round(100 * share, 1) + 0.0  # no -0.0
    return f"{number(value) if abs(value) >= 99.5 else f'{value:.{int(abs(value) < 9.95)}f}'} %"


def _prefixed(count: float, unit: str) -> str:
    if not count:
        return "0"
    scale, prefix = _unit(count, _PREFIXES, 3)
    return f"{number(count / scale)} {prefix}{unit}"


def _unit(value: float, units: Sequence[tuple[float, str]], digits: int) -> tuple[float, str]:
    rounded = abs(float(f"{value:.{digits - 1}e}"))  # 999.9 µs is 1.00 ms
    return next((each for each in units if rounded >= each[0] * (1 - 1e-9)), units[-1])


def column(total: float, parts: Sequence[float]) -> tuple[str, str, list[str]]:
    """A sum and its parts in one unit, with as many decimals as give the sum four digits: (unit, total, parts).

    What is printed adds up too: parts are rounded down or up so that no digit is missing (largest remainders).
    """
    scale, unit = _unit(total, _SECONDS, 4)
    if unit == "ms" and total < 9.9995e-3:  # microseconds are what a kernel engineer counts in
        scale, unit = 1e-6, "µs"
    decimals = max(0, 4 - len(str(int(total / scale)))) if total >= scale else 3
    step = scale / 10**decimals
    whole = [int(part // step) for part in parts]
    missing = round(total / step) - sum(whole)
    by_remainder = sorted(range(len(parts)), key=lambda i: whole[i] - parts[i] / step)
    for i in by_remainder[: max(0, missing)]:
        whole[i] += 1
    return (
        unit,
        f"{round(total / step) * step / scale:,.{decimals}f}",
        [f"{w * step / scale:,.{decimals}f}" for w in whole],
    )
