"""Cost over image size as points, for plots of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..sites.model_formula import ModelFormula
from .comparison import Comparison
from .model_costs import ModelCosts

SMALLEST, LARGEST, STEP = 64, 1024, 32


@dataclass(frozen=True)
class Curve:
    """``(side in pixels, MACs per image)`` of one variant."""

    name: str
    points: list[tuple[int, int]]


def curves(costs: ModelCosts, comparisons: Sequence[Comparison]) -> list[Curve]:
    """The model's own curve, and those of what it is compared with."""
    others = [Curve(comparison.names[1], _points(comparison.formula)) for comparison in comparisons]
    return [Curve(costs.name, _points(costs.formula)), *others]


def _points(formula: ModelFormula) -> list[tuple[int, int]]:
    sides = range(SMALLEST, LARGEST + 1, STEP)
    points = [(side, formula.macs(1, side, side)) for side in sides]
    return [(side, macs) for side, macs in points if macs > 0]
