"""A report as one page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...algebra.symbols import H, W
from ...reports.numbers import scaled
from ...reports.page import fragment, page
from .charts import roofline_chart, scaling_chart
from .comparison import Comparison
from .curves import curves
from .model_costs import ModelCosts, ModuleCost
from .roofline import Roofline
from .text import footer, headline, site_table

_NUMBERS = {"×", "MAC", "%", "attn elements", "change"}


def cost_page(costs: ModelCosts, comparisons: Sequence[Comparison], roof: Roofline | None = None) -> str:
    """A whole document."""
    return page("costs.html", f"{costs.name}: cost", **_values(costs, comparisons, roof))


def cost_fragment(costs: ModelCosts, comparisons: Sequence[Comparison], roof: Roofline | None = None) -> str:
    """The same for a notebook's cell."""
    return fragment("costs.html", **_values(costs, comparisons, roof))


def _values(costs: ModelCosts, comparisons: Sequence[Comparison], roof: Roofline | None) -> dict[str, Any]:
    """What the template names."""
    columns, rows = site_table(costs)
    sides = [side for comparison in comparisons for side in comparison.crossovers]
    crossings = [(side, float(costs.polynomial.subs({H: side, W: side}))) for side in sides]
    return {
        "headline": headline(costs),
        "comparisons": comparisons,
        "columns": columns,
        "rows": rows,
        "numbers": _NUMBERS,
        "scaling": scaling_chart(curves(costs, comparisons), crossings, costs.size[0]),
        "roofline": roof,
        "roofline_chart": None if roof is None else roofline_chart(roof),
        "modules": _tree(costs),
        "notes": dict.fromkeys([*footer(costs), *(note for each in comparisons for note in each.notes)]),
    }


@dataclass(frozen=True)
class _Branch:
    """A module that contracts, with those inside it."""

    name: str
    kind: str
    figures: str
    inside: list[_Branch]


def _tree(costs: ModelCosts) -> _Branch | None:
    """Modules that contract; None where nothing does."""
    rows = {module.name: module for module in costs.modules if module.cost.macs}
    children: dict[str, list[str]] = {}
    for name in rows:
        if name:
            children.setdefault(_parent(name, rows), []).append(name)

    def branch(name: str) -> _Branch:
        row = rows[name]
        share = f"{100 * row.cost.macs / costs.cost.macs:.1f} %"
        figures = f"{scaled(row.cost.macs, 'MAC')}, {share}, {row.parameters:,} parameters"
        return _Branch(name, row.kind, figures, [branch(child) for child in children.get(name, [])])

    return branch("") if "" in rows else None


def _parent(name: str, rows: dict[str, ModuleCost]) -> str:
    """The nearest module around it that has a row."""
    while name:
        name = name.rpartition(".")[0]
        if name in rows:
            return name
    return ""
