"""Log-log charts as SVG text: no library, no script, sharp at any size, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..count.cost import scaled
from .curves import Curve
from .hardware import Roofline

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 210, 18, 48
COLORS = ("#2f6fde", "#d9542b", "#2b9a66", "#9a4fc4", "#b8860b")

Point = tuple[float, float]


@dataclass(frozen=True)
class _Frame:
    """A log-log plane: data ranges, and where they lie on the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> Point:
        across = math.log(x / self.x[0]) / math.log(self.x[1] / self.x[0])
        upward = math.log(y / self.y[0]) / math.log(self.y[1] / self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - upward * (_HEIGHT - _TOP - _BOTTOM)


def scaling_chart(lines: Sequence[Curve], crossings: Sequence[tuple[float, float]], marked: int) -> str:
    """MACs over the side; dots where two costs cross, and a rule at the example's side."""
    values = [macs for line in lines for _, macs in line.points]
    sides = [side for line in lines for side, _ in line.points]
    frame = _Frame((min(sides), max(sides)), (min(values) / 1.3, max(values) * 1.3))
    parts = [_axes(frame, _sides_ticks(frame.x), _decades(frame.y), "side of a square image, px", "MAC an image")]
    if frame.x[0] <= marked <= frame.x[1]:
        x, top = frame.place(marked, frame.y[1])
        parts.append(f'<line class="rule" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}"/>')
    for index, line in enumerate(lines):
        parts.append(_polyline([frame.place(*found) for found in line.points], COLORS[index % len(COLORS)]))
    for side, macs in crossings:
        if frame.x[0] <= side <= frame.x[1] and frame.y[0] <= macs <= frame.y[1]:
            x, y = frame.place(side, macs)
            parts.append(f'<circle class="crossing" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
            parts.append(f'<text x="{x + 8:.1f}" y="{y + 14:.1f}">{side:.0f} px</text>')
    parts.append(_legend([line.name for line in lines]))
    return _picture("MACs over image side", parts)


def roofline_chart(roof: Roofline) -> str:
    """Operations a second that the roof allows over FLOP a byte; one dot a part of the model."""
    peak, bandwidth = roof.hardware.peak[roof.dtype], roof.hardware.bandwidth
    ridge = peak / bandwidth
    intensities = [point.intensity for point in roof.points] or [ridge]
    x = (min(0.5, min(intensities)) / 1.2, max(4 * ridge, *intensities) * 1.2)
    frame = _Frame(x, (x[0] * bandwidth / 1.5, peak * 2))
    parts = [_axes(frame, _decades(frame.x), _decades(frame.y), "FLOP a byte", "FLOP/s at most")]
    roof_line = [(x[0], x[0] * bandwidth), (ridge, peak), (x[1], peak)]
    parts.append(_polyline([frame.place(*found) for found in roof_line], COLORS[0]))
    for point in roof.points:
        core = point.name.endswith("attention")
        px, py = frame.place(point.intensity, min(peak, point.intensity * bandwidth))
        title = f"{point.name}: {point.intensity:.1f} FLOP/byte, {point.limit}-bound"
        color = COLORS[1] if core else COLORS[2]
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{color}"><title>{escape(title)}</title></circle>'
        )
    parts.append(_legend([f"roof, {roof.dtype}", "attention cores", "linear maps"]))
    return _picture(f"Roofline of {roof.hardware.name}", parts)


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_title: str, y_title: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}"/>']
    for tick in x_ticks:
        x, _ = frame.place(tick, frame.y[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(f'<text text-anchor="middle" x="{x:.1f}" y="{bottom + 16}">{tick:g}</text>')
    for tick in y_ticks:
        _, y = frame.place(frame.x[0], tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{escape(_tick(tick))}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text text-anchor="middle" x="{middle:.0f}" y="{_HEIGHT - 8}">{escape(x_title)}</text>')
    turned = f'transform="rotate(-90 14 {(_TOP + bottom) / 2:.0f})"'
    parts.append(f'<text text-anchor="middle" x="14" y="{(_TOP + bottom) / 2:.0f}" {turned}>{escape(y_title)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    return scaled(value).replace(".000", "").replace(".00", "").replace(".0", "").strip()


def _decades(limits: tuple[float, float]) -> list[float]:
    first, last = (math.ceil(math.log10(limits[0])), math.floor(math.log10(limits[1])))
    return [10.0**power for power in range(first, last + 1)]


def _sides_ticks(limits: tuple[float, float]) -> list[float]:
    return [side for side in (64, 128, 224, 384, 512, 768, 1024) if limits[0] <= side <= limits[1]]


def _polyline(points: Sequence[Point], color: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{text}"/>'


def _legend(names: Sequence[str]) -> str:
    x = _WIDTH - _RIGHT + 14
    parts = []
    for index, name in enumerate(names):
        y, color = _TOP + 20 * index, COLORS[index % len(COLORS)]
        parts.append(f'<rect x="{x}" y="{y + 2}" width="12" height="4" fill="{color}"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 8}">{escape(name)}</text>')
    return "".join(parts)


def _picture(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
