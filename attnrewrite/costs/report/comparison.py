"""Two costs side by side: of two models, or of one before and after a conversion that has not been made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...algebra.crossover import cheaper_above, crossings
from ...algebra.symbols import order
from ...reports.names import folded_name, numberless
from ...reports.numbers import scaled
from ...reports.tables import aligned
from ..sites.counted_site import CountedSite
from ..sites.model_formula import ModelFormula
from .model_costs import ModelCosts


@dataclass(frozen=True)
class ComparedSite:
    """One site before and after; either is None where the other model has no such site. MACs of the whole batch."""

    name: str
    before: CountedSite | None
    after: CountedSite | None
    before_macs: int
    after_macs: int

    @property
    def change(self) -> int:
        return self.after_macs - self.before_macs

    @property
    def alike(self) -> tuple[Any, ...]:
        """The same for rows that differ only in the numbers of their names."""
        kinds = self.before and self.before.kind, self.after and self.after.kind
        return numberless(self.name), kinds, self.before_macs, self.after_macs


@dataclass(frozen=True)
class Comparison:
    """Costs in MACs at ``size`` and ``batch``, and the formulas behind them.

    Attributes:
        names: what stands for before and after.
        rows: site by site, in the order of the first model.
        formula: of the model after; ``before`` of the one before.
        notes: what was assumed.
    """

    names: tuple[str, str]
    size: tuple[int, int]
    batch: int
    rows: list[ComparedSite]
    before: ModelFormula
    formula: ModelFormula
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_reports(cls, first: ModelCosts, second: ModelCosts) -> Comparison:
        """Sites of the same name share a row. The second's formulas are evaluated at the first's size."""
        height, width = first.size
        later = {site.name: site for site in second.sites}
        macs = {name: _at(site, first.batch, height, width) for name, site in later.items()}
        rows = [
            ComparedSite(site.name, site, later.get(site.name), site.macs, macs.get(site.name, 0))
            for site in first.sites
        ]
        known = {site.name for site in first.sites}
        rows += [ComparedSite(name, None, site, 0, macs[name]) for name, site in later.items() if name not in known]
        names = (first.name, second.name if second.name != first.name else f"{second.name} (other)")
        notes = [*first.assumptions, *second.assumptions]
        return cls(names, first.size, first.batch, rows, first.formula, second.formula, notes)

    @property
    def before_macs(self) -> int:
        return self.before.macs(self.batch, *self.size)

    @property
    def after_macs(self) -> int:
        return self.formula.macs(self.batch, *self.size)

    @property
    def orders(self) -> tuple[str, str]:
        return order(self.before.per_image), order(self.formula.per_image)

    @property
    def crossovers(self) -> list[float]:
        """Sides of square images, in pixels, at which both cost the same (without padding)."""
        return crossings(self.before.per_image + self.before.once, self.formula.per_image + self.formula.once)

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        before, after = self.before_macs, self.after_macs
        size = f"{self.size[0]}x{self.size[1]}"
        if after == before:
            return f"{self.names[1]} costs what {self.names[0]} does at {size}: {scaled(before, 'MAC')}."
        verb = "raises" if after > before else "lowers"
        text = (
            f"{self.names[1]} {verb} the cost at {size} from {scaled(before, 'MAC')} to {scaled(after, 'MAC')} "
            f"({(after / before - 1) * 100:+.1f} %)"
        )
        above = cheaper_above(self.before.per_image + self.before.once, self.formula.per_image + self.formula.once)
        if above is None:
            return f"{text}; no larger image makes it the cheaper one."
        return f"{text}; it is the cheaper one on square images from {above:.0f} px up." if above else f"{text}."

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The table's columns and rows: alike sites share a row, and the last one is the whole model."""
        columns = ("site", "×", "before", "MAC", "after", "MAC", "change")
        groups: dict[tuple[Any, ...], list[ComparedSite]] = {}
        for row in self.rows:
            groups.setdefault(row.alike, []).append(row)
        before, after = self.before_macs, self.after_macs
        orders = self.orders
        total = ("total", "", orders[0], scaled(before), orders[1], scaled(after), _change(before, after))
        return columns, [*map(_cells, groups.values()), total]

    def __str__(self) -> str:
        crossings = ", ".join(f"{side:.0f} px" for side in self.crossovers) or "none"
        return "\n".join(
            [
                f"{self.names[0]} -> {self.names[1]} at {self.size[0]}x{self.size[1]}",
                *aligned(*self.cells()),
                f"equal cost on square images of: {crossings}",
                self.verdict,
                *(f"note: {note}" for note in self.notes),
            ]
        )


def _cells(rows: list[ComparedSite]) -> tuple[str, ...]:
    """Of alike sites together."""
    first = rows[0]
    before, after = sum(row.before_macs for row in rows), sum(row.after_macs for row in rows)
    return (
        folded_name([row.name for row in rows]),
        str(len(rows)),
        first.before.kind if first.before else "",
        scaled(before),
        first.after.kind if first.after else "",
        scaled(after),
        _change(before, after),
    )


def _change(before: int, after: int) -> str:
    if before == after:
        return "0 %"
    return f"{100 * (after / before - 1):+.1f} %" if before else "new"


def _at(site: CountedSite, batch: int, height: int, width: int) -> int:
    return site.macs if site.formula is None else site.formula.macs_of(batch, height, width)
