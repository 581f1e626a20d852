"""One site and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..certify import Certificate
from ..errors import Refusal
from ..ir.contract import Conversion, Target
from ..ir.sites import Site


@dataclass(frozen=True)
class PlannedSite:
    """One site and what becomes of it: ``status`` is convert, kept, refused or untouched, ``why`` says why.

    ``index`` counts the sites that the same target converts. ``keeps_prefix``: what prefix tokens attend to stays as it
    was, as far as the example input shows.
    """

    site: Site
    status: str = "untouched"
    why: str = ""
    refusal: Refusal | None = None
    target: Target | None = None
    index: int = 0
    conversion: Conversion | None = None
    certificate: Certificate | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    keeps_prefix: bool = False

    @property
    def converting(self) -> bool:
        return self.status == "convert"

    @property
    def told(self) -> str:
        """``why``, and for a refused site what to do: to leave it out by its name, where nothing else helps."""
        return self.why if self.refusal is None else self.refusal.told(self.site.name)

    def refused(self, reason: Refusal) -> PlannedSite:
        return replace(self, status="refused", why=str(reason), refusal=reason)

    def kept(self, reason: str) -> PlannedSite:
        return replace(self, status="kept", why=reason, refusal=None)

    def measured_as(self, **figures: Any) -> PlannedSite:
        return replace(self, measured={**self.measured, **figures})
