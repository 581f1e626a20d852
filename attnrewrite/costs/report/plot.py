"""Curves with matplotlib, for papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import ArgumentError
from .comparison import Comparison
from .curves import curves
from .model_costs import ModelCosts


def plot(costs: ModelCosts, comparisons: Sequence[Comparison], axes: Any = None) -> Any:
    """Cost over the side of a square image, one line a variant; returns the axes.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as cause:
        raise ArgumentError("plot: matplotlib is not installed: pip install 'attnrewrite[plots]'") from cause
    axes = pyplot.subplots()[1] if axes is None else axes
    for line in curves(costs, comparisons):
        axes.loglog(*zip(*line.points, strict=True), label=line.name)
    axes.set_xlabel("side of a square image, pixels")
    axes.set_ylabel("MACs per image")
    axes.legend()
    return axes
