"""Simple forms that make one number of others, found from what all of them were on several looks.

Every form is given the numbers that a graph knows and writes the first expression of them that is the wanted number on
every look; None if there is none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from torch import fx

Vector = tuple[float, ...]
"""What a number was, look by look."""

Emit = Callable[[], Any]
"""Puts an expression into the graph, where it is being written, and gives its value."""

_FACTORS = 40
"""The first this many known numbers are tried in products of two, a quarter of them in products of three."""


def whole_form(graph: fx.Graph, known: Iterable[tuple[Vector, Emit]], wanted: Vector) -> Any:
    """Of one known number: its sum or product with a constant, its whole root, its quotient by a constant, rounded
    either way, the next multiple of a constant, and what is missing to that.

    Two values alone are evidence for a multiple only: something of the other forms fits any two.
    """
    two = len(set(wanted)) < 3
    for numbers, emit in known:
        pairs = [(int(extent), int(value)) for extent, value in zip(numbers, wanted, strict=True)]
        (extent, value), *_ = pairs
        if extent and value % extent == 0 and all(e * (value // extent) == v for e, v in pairs):
            return graph.call_function(operator.mul, (emit(), value // extent))
        if two:
            continue
        if all(v - e == value - extent for e, v in pairs):
            return graph.call_function(operator.add, (emit(), value - extent))
        if all(e > 0 and math.isqrt(e) == v for e, v in pairs):
            return graph.call_function(_whole_root, (emit(),))
        for unit in range(2, 65):
            for form in (_floor, _ceil, _up_to, _short_of):
                if all(form(e, unit) == v for e, v in pairs):
                    return graph.call_function(form, (emit(), unit))
    return None


def product_form(graph: fx.Graph, known: Iterable[tuple[Vector, Emit]], wanted: Vector) -> Any:
    """Of two or three known numbers: a constant ratio of their product."""
    factors = [(numbers, emit) for numbers, emit in known if min(numbers) > 0][:_FACTORS]
    pairs = [((a, b), (m, n)) for i, (a, m) in enumerate(factors) for (b, n) in factors[i:]]
    triples = [((a, *p), (m, *e)) for (p, e) in pairs[: _FACTORS * 10] for a, m in factors[: _FACTORS // 4]]
    for numbers, emits in (*pairs, *triples):
        ratios = {Fraction(v, math.prod(each)) for v, *each in zip(map(int, wanted), *numbers, strict=True)}
        if len(ratios) != 1:
            continue
        (ratio,) = ratios
        product = emits[0]()
        for emit in emits[1:]:
            product = graph.call_function(operator.mul, (product, emit()))
        if ratio.numerator != 1:
            product = graph.call_function(operator.mul, (product, ratio.numerator))
        if ratio.denominator != 1:
            product = graph.call_function(operator.floordiv, (product, ratio.denominator))
        return product
    return None


def real_form(graph: fx.Graph, known: Iterable[tuple[Vector, Emit]], wanted: Vector) -> Any:
    """Of one known number: a constant times it, its root, its logarithm or the reciprocal of either of the first.

    The constant fits one value and one of the forms fits many a second: two values alone are no evidence.
    """
    if len(set(wanted)) < 3:
        return None
    for numbers, emit in known:
        if min(numbers) <= 0:
            continue
        for function in (float, math.sqrt, math.log, _reciprocal, _reciprocal_root):
            ratios = [
                value / function(number) if function(number) else math.nan
                for value, number in zip(wanted, numbers, strict=True)
            ]
            if max(ratios) - min(ratios) <= 1e-13 * abs(ratios[0]):
                value = graph.call_function(function, (emit(),))
                return graph.call_function(operator.mul, (value, ratios[0]))
    return None


def _floor(extent: int, unit: int) -> int:
    return extent // unit


def _ceil(extent: int, unit: int) -> int:
    return -(-extent // unit)


def _up_to(extent: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-extent // unit) * unit


def _short_of(extent: int, unit: int) -> int:
    """What is missing to the next multiple of ``unit``."""
    return -extent % unit


def _whole_root(extent: int) -> int:
    return int(extent**0.5)


def _reciprocal(extent: float) -> float:
    return 1 / extent


def _reciprocal_root(extent: float) -> float:
    return float(extent**-0.5)
