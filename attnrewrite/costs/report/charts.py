"""The charts of a page: cost over image size, and the parts of a model under a machine's roof."""

from __future__ import annotations

from collections.abc import Sequence

from ...reports.charts import COLORS, Dot, Line, LogLogChart, decades, within
from .curves import Curve
from .roofline import Roofline

_SIDES = (64, 128, 224, 384, 512, 768, 1024)


def scaling_chart(curves: Sequence[Curve], crossings: Sequence[tuple[float, float]], marked: int) -> LogLogChart:
    """MACs per image over the side; rings where two costs cross, and a rule at the example's side."""
    values = [macs for curve in curves for _, macs in curve.points]
    sides = [side for curve in curves for side, _ in curve.points]
    x, y = (min(sides), max(sides)), (min(values) / 1.3, max(values) * 1.3)
    colors = [COLORS[index % len(COLORS)] for index in range(len(curves))]
    return LogLogChart(
        title="MACs over image side",
        x_title="side of a square image, px",
        y_title="MACs per image",
        x=x,
        y=y,
        x_values=_SIDES,
        lines=[Line(curve.points, color) for curve, color in zip(curves, colors, strict=True)],
        dots=[Dot((side, macs), f"{side:.0f} px") for side, macs in crossings if within(side, x) and within(macs, y)],
        marked=marked,
        legend=[(curve.name, color) for curve, color in zip(curves, colors, strict=True)],
    )


def roofline_chart(roof: Roofline) -> LogLogChart:
    """FLOP/s that the roof allows over FLOP/byte; one dot a part of the model."""
    peak, bandwidth = roof.hardware.peak[roof.dtype], roof.hardware.bandwidth
    ridge = peak / bandwidth
    intensities = [point.intensity for point in roof.points] or [ridge]
    x = (min(0.5, *intensities) / 1.2, max(4 * ridge, *intensities) * 1.2)
    roof_color, core_color, linear_color = COLORS[:3]
    dots = [
        Dot(
            at=(point.intensity, min(peak, point.intensity * bandwidth)),
            title=f"{point.name}: {point.intensity:.1f} FLOP/byte, {point.limit}-bound",
            color=core_color if point.name.endswith("attention") else linear_color,
        )
        for point in roof.points
    ]
    return LogLogChart(
        title=f"Roofline of {roof.hardware.name}",
        x_title="arithmetic intensity, FLOP/byte",
        y_title="attainable FLOP/s",
        x=x,
        y=(x[0] * bandwidth / 1.5, peak * 2),
        x_values=decades(x),
        lines=[Line([(x[0], x[0] * bandwidth), (ridge, peak), (x[1], peak)], roof_color)],
        dots=dots,
        legend=[(f"roof, {roof.dtype}", roof_color), ("attention cores", core_color), ("linear maps", linear_color)],
    )
