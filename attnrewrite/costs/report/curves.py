"""Cost over image size as points, for plots of any kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..sites.model_formula import ModelFormula

if TYPE_CHECKING:
    from .report import Report

SMALLEST, LARGEST, STEP = 64, 1024, 32


@dataclass(frozen=True)
class Curve:
    """``(side in pixels, MACs an image)`` of one variant."""

    name: str
    points: list[tuple[int, int]]


def curves(report: Report) -> list[Curve]:
    """The model's own curve, and those of what it is compared with."""
    others = [Curve(comparison.names[1], _points(comparison.formula)) for comparison in report.comparisons]
    return [Curve(report.name, _points(report.formula)), *others]


def _points(formula: ModelFormula) -> list[tuple[int, int]]:
    sides = range(SMALLEST, LARGEST + 1, STEP)
    points = [(side, formula.macs(1, side, side)) for side in sides]
    return [(side, macs) for side, macs in points if macs > 0]
