"""Numbers as people read them."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def scaled(value: float, unit: str = "") -> str:
    """Four significant digits with a decimal prefix and a unit: ``4.599 GMAC``, ``1.230 M``, ``96 MAC``, ``0.50``."""
    size, prefix = _prefix(value, digits=4)
    if not prefix:
        return f"{value:.{0 if float(value).is_integer() else 2}f} {unit}".rstrip()
    before_point = len(str(int(abs(value) / size)))
    return f"{value / size:.{max(0, 4 - before_point)}f} {prefix}{unit}"


def short(value: float) -> str:
    """Three significant digits at most, without a blank, for narrow columns: ``1.18M``, ``148k``, ``96``."""
    size, prefix = _prefix(value, digits=3)
    return f"{value / size:.3g}{prefix}"


def error_text(error: float | None) -> str:
    """A relative error with two digits; None is one that was not measured, which is never zero."""
    return "not measured" if error is None else f"{error:.1e}"


def _prefix(value: float, digits: int) -> tuple[float, str]:
    """Of the value as it is printed: 999,999 is 1.000 M."""
    rounded = abs(float(f"{value:.{digits}g}"))
    return next(((size, prefix) for size, prefix in _PREFIXES if rounded >= size), (1.0, ""))
