"""A polynomial in the image's sides through exact counts on a lattice of sizes."""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy import Expr, Rational

from .symbols import H, W

_POWERS = (0, 1, 2)


def fitted(count: Callable[[int, int], int | None], unit: int, size: tuple[int, int]) -> Expr | None:
    """The polynomial of degree two in each side that ``count`` equals at multiples of ``unit`` not below ``size``.

    None where ``count`` has no value there, or a tenth and eleventh point refute it.
    """
    first = tuple(-(-side // unit) for side in size)
    rows, columns = ([unit * (start + step) for step in _POWERS] for start in first)
    values = [[count(height, width) for width in columns] for height in rows]
    known = [[value for value in row if value is not None] for row in values]
    if any(len(row) < len(columns) for row in known):
        return None
    polynomial = _through(rows, columns, known)
    held_out = [(rows[-1] + unit, columns[0]), (rows[0], columns[-1] + unit)]
    for height, width in held_out:
        expected = count(height, width)
        if expected is not None and polynomial.subs({H: height, W: width}) != expected:
            return None
    return polynomial


def _through(rows: list[int], columns: list[int], values: list[list[int]]) -> Expr:
    """Tensor-product interpolation in exact rationals."""
    powers = sympy.Matrix(len(rows), len(rows), lambda i, j: Rational(rows[i]) ** _POWERS[j]).inv()
    across = sympy.Matrix(len(columns), len(columns), lambda i, j: Rational(columns[i]) ** _POWERS[j]).inv()
    coefficients = powers * sympy.Matrix(values) * across.T
    return sympy.Add(*(coefficients[i, j] * H**i * W**j for i in _POWERS for j in _POWERS))
