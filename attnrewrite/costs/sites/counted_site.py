"""A site with what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from ...algebra.site_formula import SiteFormula
from ...ir.sites import Site
from .core_sites import CoreSite
from .extents import Sides
from .operator_sites import OperatorSite


@dataclass(frozen=True)
class OwnModule:
    """One of this library's modules, called once; ``kind`` is of sites."""

    name: str
    kind: str
    text: str

    def describe(self) -> str:
        return self.text


AnySite = Site | CoreSite | OperatorSite | OwnModule


@dataclass(frozen=True)
class CountedSite:
    """A site, its formula, and what its operations count at capture (MACs of all images).

    ``formula`` is None where none equals the count; ``why`` then says so.
    """

    name: str
    kind: str
    describe: str
    macs: int
    formula: SiteFormula | None
    site: AnySite | None
    sides: Sides | None = None
    why: str = ""
