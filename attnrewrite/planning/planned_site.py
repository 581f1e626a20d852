"""One site and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..certify import Certificate
from ..ir.contract import Conversion, Target
from ..ir.sites import Site


@dataclass
class PlannedSite:
    """One site and what becomes of it: ``status`` is convert, kept, refused or untouched, ``why`` says why.

    ``keeps_prefix``: what prefix tokens attend to stays as it was, as far as the example input shows.
    """

    site: Site
    status: str = "untouched"
    why: str = ""
    target: Target | None = None
    conversion: Conversion | None = None
    certificate: Certificate | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    keeps_prefix: bool = False

    def refuse(self, reason: str) -> None:
        self.status, self.why = "refused", reason

    def keep(self, reason: str) -> None:
        self.status, self.why = "kept", reason
