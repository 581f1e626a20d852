"""The one-letter axes of attention operands: groups, then ``x`` query, ``y`` key, ``d`` summed and ``e`` value dim."""

from __future__ import annotations


def position_and_dim(axes: str) -> tuple[str, str]:
    """The names of an operand's token axis (``x`` query, ``y`` key) and its summed or value axis (``d``, ``e``)."""
    return next(axis for axis in axes if axis in "xy"), next(axis for axis in axes if axis in "de")
