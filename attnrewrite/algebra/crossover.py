"""At which image sizes two costs are equal."""

from __future__ import annotations

from sympy import Expr

from .symbols import in_side


def crossings(first: Expr, second: Expr) -> list[float]:
    """Every positive real side, ascending, at which two costs of square images are equal on their envelopes."""
    left, right = in_side(first), in_side(second)
    difference = left - right
    if difference.is_zero or difference.degree() < 1:
        return []
    roots = difference.nroots(n=20, maxsteps=200)
    real = {round(float(root.as_real_imag()[0]), 6) for root in roots if abs(root.as_real_imag()[1]) < 1e-9}
    return sorted(root for root in real if root > 1e-6)


def cheaper_above(before: Expr, after: Expr) -> float | None:
    """The side above which ``after`` is cheaper than ``before`` for good; 0 if it always is, None if it never is."""
    difference = in_side(after) - in_side(before)
    if difference.is_zero or difference.LC() > 0:
        return None
    return max(crossings(before, after), default=0.0)
