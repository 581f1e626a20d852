"""One site and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..certify import Certificate
from ..errors import Refusal
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
    refusal: Refusal | None = None
    target: Target | None = None
    conversion: Conversion | None = None
    certificate: Certificate | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    keeps_prefix: bool = False

    @property
    def told(self) -> str:
        """``why``, and for a refused site what to do: to leave it out by its name, where nothing else helps."""
        return self.why if self.refusal is None else self.refusal.told(self.site.name)

    def refuse(self, reason: Refusal) -> None:
        self.status, self.why, self.refusal = "refused", str(reason), reason

    def keep(self, reason: str) -> None:
        self.status, self.why, self.refusal = "kept", reason, None
