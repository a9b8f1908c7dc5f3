"""Numbers as people read them."""

from __future__ import annotations

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str, digits: int = 3) -> str:
    """1.23e9, 'byte/s' -> '1.23 Gbyte/s'."""
    for size, prefix in _SI:
        if abs(value) >= size:
            return f"{_plain(value / size, digits)} {prefix}{unit}"
    return f"{_plain(value, digits)} {unit}"


def _plain(value: float, digits: int) -> str:
    """At most `digits` significant digits, never an exponent, no trailing zeros."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


def seconds(value: float) -> str:
    """0.00123 -> '1.23 ms'."""
    if value >= 100:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{_plain(value / size, 3)} {unit}"
    return f"{_plain(value / 1e-6, 3)} µs"


def megabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def percent(value: float, signed: bool = False) -> str:
    """0.0123 -> '1.2 %': two significant digits below ten per cent, none after the point above."""
    shown = 100 * value
    size = abs(shown)
    digits = 0 if size >= 9.95 else 1 if size >= 0.995 else 2
    return f"{shown:+.{digits}f} %" if signed else f"{shown:.{digits}f} %"


def rate(value: float) -> str:
    """Tokens a second: thousands separated, a decimal only below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def amount(value: float, unit: str) -> str:
    """A figure of a benchmark: token/s as `rate` writes it, seconds, or bytes as MB."""
    if unit == "byte":
        return f"{value / 1e6:,.0f}"
    return f"{value:.2f}" if unit == "s" else rate(value)


def times(value: float) -> str:
    """A ratio: 18.23 -> 18.2 and a multiplication sign."""
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:.{digits}f}\N{MULTIPLICATION SIGN}"
