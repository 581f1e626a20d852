"""A polynomial in the image's sides through exact counts on a lattice of sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import sympy
from sympy import Expr, Rational

from .symbols import H, W

_POWERS = (0, 1, 2)


def fitted(count: Callable[[int, int], int | None], unit: int, size: tuple[int, int]) -> Expr | None:
    """The polynomial of degree two in each side that ``count`` equals at multiples of ``unit`` not below ``size``.

    None where ``count`` has no value there, or a tenth and eleventh point refute it.
    """
    first = tuple(-(-side // unit) for side in size)
    rows, columns = (tuple(unit * (start + step) for step in _POWERS) for start in first)
    values: list[int] = []
    for height in rows:
        for width in columns:
            value = count(height, width)
            if value is None:  # no use in asking for the others
                return None
            values.append(value)
    held_out = ((rows[-1] + unit, columns[0]), (rows[0], columns[-1] + unit))
    return _confirmed(rows, columns, tuple(values), tuple((*point, count(*point)) for point in held_out))


@lru_cache(maxsize=4096)
def _confirmed(
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    values: tuple[int, ...],
    held_out: tuple[tuple[int, int, int | None], ...],
) -> Expr | None:
    """Blocks repeat, and so do their counts."""
    polynomial = _through(rows, columns, values)
    for height, width, expected in held_out:
        if expected is not None and polynomial.subs({H: height, W: width}) != expected:
            return None
    return polynomial


def _through(rows: tuple[int, ...], columns: tuple[int, ...], values: tuple[int, ...]) -> Expr:
    """Tensor-product interpolation in exact rationals."""
    powers, across = (
        sympy.Matrix(len(sides), len(sides), lambda i, j, sides=sides: Rational(sides[i]) ** _POWERS[j]).inv()
        for sides in (rows, columns)
    )
    coefficients = powers * sympy.Matrix(len(rows), len(columns), values) * across.T
    return sympy.Add(*(coefficients[i, j] * H**i * W**j for i in _POWERS for j in _POWERS))
