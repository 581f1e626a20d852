"""Curves with matplotlib, for papers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from .curves import Curve, curves

if TYPE_CHECKING:
    from .report import Report


def plot(report: Report, axes: Any = None) -> Any:
    """Cost over the side of a square image, one line a variant; returns the axes.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as cause:
        raise ArgumentError("plot: matplotlib is not installed: pip install 'attnrewrite[plots]'") from cause
    axes = pyplot.subplots()[1] if axes is None else axes
    lines: list[Curve] = curves(report)
    for line in lines:
        axes.loglog(*zip(*line.points, strict=True), label=line.name)
    axes.set_xlabel("side of a square image, pixels")
    axes.set_ylabel("MAC an image")
    axes.legend()
    return axes
