"""Log-log charts as data in pixels; ``templates/chart.html`` draws them, sharp at any size, on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .numbers import scaled

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 78, 550, 18, 332
COLORS = ("#2f6fde", "#d9542b", "#2b9a66", "#9a4fc4", "#b8860b")

Point = tuple[float, float]
Range = tuple[float, float]


@dataclass(frozen=True)
class Line:
    points: Sequence[Point]
    color: str


@dataclass(frozen=True)
class Dot:
    """``title`` shows when the pointer rests on it. Without a ``color`` it is a ring with its title beside it."""

    at: Point
    title: str
    color: str = ""


@dataclass(frozen=True)
class LogLogChart:
    """Lines and dots over two logarithmic axes; ``x`` and ``y`` are the ranges shown, in the units of the data.

    Attributes:
        marked: where a vertical rule stands, if that is in range.
        legend: names by color.
    """

    title: str
    x_title: str
    y_title: str
    x: Range
    y: Range
    x_values: Sequence[float]
    lines: Sequence[Line] = ()
    dots: Sequence[Dot] = ()
    marked: float | None = None
    legend: Sequence[tuple[str, str]] = field(default=())

    @property
    def bounds(self) -> dict[str, int]:
        """The picture's size and the frame in it, in pixels."""
        return {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}

    def across(self, value: float) -> float:
        """Pixels from the left."""
        return round(LEFT + _share(value, self.x) * (RIGHT - LEFT), 1)

    def down(self, value: float) -> float:
        """Pixels from the top."""
        return round(BOTTOM - _share(value, self.y) * (BOTTOM - TOP), 1)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        return [(self.across(value), f"{value:g}") for value in self.x_values if within(value, self.x)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return [(self.down(value), _tick(value)) for value in decades(self.y)]

    @property
    def rule(self) -> float | None:
        """Pixels from the left of ``marked``."""
        return self.across(self.marked) if self.marked is not None and within(self.marked, self.x) else None


def decades(limits: Range) -> list[float]:
    """The powers of ten in a range."""
    first, last = math.ceil(math.log10(limits[0])), math.floor(math.log10(limits[1]))
    return [10.0**power for power in range(first, last + 1)]


def within(value: float, limits: Range) -> bool:
    return limits[0] <= value <= limits[1]


def _share(value: float, limits: Range) -> float:
    return math.log(value / limits[0]) / math.log(limits[1] / limits[0])


def _tick(value: float) -> str:
    """Powers of ten need no digits after the point."""
    return scaled(value).replace(".000", "").replace(".00", "").replace(".0", "")
