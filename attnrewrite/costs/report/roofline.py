"""Where the parts of a model lie under the roof of a machine (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..sites.counted_site import CountedSite
from .evaluation import item_bytes
from .hardware import Hardware


@dataclass(frozen=True)
class RooflinePoint:
    """One part of the model: attention core of a site, or its linear maps. ``seconds`` is a lower bound."""

    name: str
    flops: int
    bytes: int
    intensity: float
    limit: str
    seconds: float


@dataclass(frozen=True)
class Roofline:
    """Every site's parts under one machine's roof, each operand moved once (what a fused kernel reaches at best)."""

    hardware: Hardware
    dtype: str
    points: list[RooflinePoint]

    @property
    def seconds(self) -> float:
        """Lower bound of the whole, part after part."""
        return sum(point.seconds for point in self.points)

    def __str__(self) -> str:
        ridge = self.hardware.ridge(self.dtype)
        rows = [
            f"roofline of {self.hardware.name}, {self.dtype}: ridge {ridge:.0f} FLOP/byte ({self.hardware.source})",
            *(
                f"  {p.name:<44} {p.intensity:8.1f} FLOP/byte  {p.limit:<7} bound {p.seconds * 1e6:8.2f} µs"
                for p in self.points
            ),
            f"  lower bound of all parts one after another: {self.seconds * 1e3:.3f} ms",
        ]
        return "\n".join(rows)


def roofline(
    sites: Iterable[CountedSite], size: tuple[int, int], batch: int, hardware: Hardware, dtype: str
) -> Roofline:
    """Every site with a formula under the roof, its operands in ``dtype``.

    Raises:
        ArgumentError: unknown dtype, or one of which no peak is known.
    """
    hardware.ridge(dtype)
    points = [point for site in sites for point in _points(site, size, batch, hardware, dtype)]
    return Roofline(hardware, dtype, points)


def _points(
    site: CountedSite, size: tuple[int, int], batch: int, hardware: Hardware, dtype: str
) -> Iterator[RooflinePoint]:
    formula, item = site.formula, item_bytes(dtype)
    if formula is None:
        return
    core, dense, moved, streams = (
        formula.number(part, *size) * batch for part in (formula.core, formula.dense, formula.moved, formula.streams)
    )
    if core:
        yield _point(hardware, dtype, f"{site.name} attention", 2 * core, moved * item)
    if dense and formula.streams != 0:
        weights = formula.number(formula.weights, *size)
        yield _point(hardware, dtype, f"{site.name} linear", 2 * dense, (streams + weights) * item)


def _point(hardware: Hardware, dtype: str, name: str, flops: int, size: int) -> RooflinePoint:
    intensity = flops / size
    limit = "compute" if intensity >= hardware.ridge(dtype) else "memory"
    return RooflinePoint(name, flops, size, intensity, limit, hardware.bound(flops, size, dtype))
