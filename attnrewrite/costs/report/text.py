"""A report as text: for terminals, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ...algebra.site_formula import SiteFormula
from ...algebra.symbols import H, W, plain
from ...reports.names import folded_name, numberless
from ...reports.numbers import scaled
from ...reports.tables import aligned, markdown_table
from ..count.cost import UNITS
from ..sites.counted_site import CountedSite
from .comparison import Comparison
from .model_costs import ModelCosts


def site_table(costs: ModelCosts) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: sites that differ only in numbers of their names and cost the same share a row."""
    columns = ("site", "×", "kind", "MAC", "%", "attn elements", "order", "formula (MACs per image)", "with")
    groups: dict[tuple[object, ...], list[CountedSite]] = {}
    for site in costs.sites:
        formula = None if site.formula is None else site.formula.total
        groups.setdefault((numberless(site.name), site.kind, site.macs, formula), []).append(site)
    return columns, [_cells(costs, sites) for sites in groups.values()]


def _cells(costs: ModelCosts, sites: list[CountedSite]) -> tuple[str, ...]:
    """Of alike sites together."""
    site, total = sites[0], costs.cost.macs
    macs = sum(each.macs for each in sites)
    share = f"{100 * macs / total:.1f}" if total else ""
    name, count = folded_name([each.name for each in sites]), len(sites)
    if site.formula is None:
        return (name, str(count), site.kind, scaled(macs), share, "", "", "counted only", "")
    formula = site.formula
    elements = formula.number(formula.attention_map, *costs.size) * count * costs.batch
    return (
        name, str(count), formula.kind, scaled(macs), share, scaled(elements) if elements else "",
        formula.order, plain(formula.macs), _definitions(formula),
    )  # fmt: skip


def _definitions(formula: SiteFormula) -> str:
    """The symbols of a site's formula: ``N = ⌊H/16⌋·⌊W/16⌋ + 1, C = 384``."""
    used = formula.macs.free_symbols
    return ", ".join(f"{name} = {plain(value)}" for name, value in formula.values.items() if name in used)


def headline(costs: ModelCosts) -> str:
    height, width = costs.size
    return (
        f"analyze({costs.name}) at {height}x{width}, batch {costs.batch}, {costs.dtype}: "
        f"{scaled(costs.total, UNITS[costs.convention])}, {costs.parameters.total:,} parameters "
        f"({costs.parameters.trainable:,} trainable)"
    )


def footer(costs: ModelCosts) -> list[str]:
    """What is true of the whole model, and what is not counted: an empty list is a statement too."""
    cost = costs.cost
    lines = [
        f"model: {plain(costs.polynomial)} MACs per image on multiples of {costs.lattice} px, {costs.order}",
        *(f"check {check}" for check in costs.checks),
        f"forward: {cost.macs:,} MAC, {cost.elementwise:,} elementwise operations, {cost.bytes_read:,} bytes read, "
        f"{cost.bytes_written:,} bytes written (unfused)",
        f"kept for backward, unfused: grows as {plain(costs.dominant_memory)} elements an image",
        f"padding overhead: {padding_overhead(costs):.1f} %; does not grow with the batch: "
        f"{scaled(costs.formula.macs(0, *costs.size), 'MAC')}",
        *_defined(costs),
        "not counted: " + ("; ".join(map(str, costs.unsupported[:8])) or "nothing"),
    ]
    lines += [f"assumption: {note}" for note in costs.assumptions] or ["assumptions: none"]
    return lines


def _defined(costs: ModelCosts) -> list[str]:
    """Modules that are not counted by their operations."""
    modules = list(dict.fromkeys(costs.trace.defined))
    if not modules:
        return []
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    executed = f"operations here contract {costs.trace.executed:,} MAC in all"
    return [f"counted by definition: {', '.join(modules[:3])}{more} ({executed})"]


def padding_overhead(costs: ModelCosts) -> float:
    """How much more than its envelope the model costs at this size, in percent: windows and strides that do not fit."""
    smooth = float(costs.polynomial.subs({H: costs.size[0], W: costs.size[1]}))
    exact = costs.formula.macs(1, *costs.size)
    return 100 * (exact / smooth - 1) if smooth > 0 else 0.0


def terminal(costs: ModelCosts, comparisons: Sequence[Comparison]) -> str:
    lines = [headline(costs), *aligned(*site_table(costs)), *footer(costs)]
    for comparison in comparisons:
        lines += ["", str(comparison)]
    return "\n".join(lines)


def markdown(costs: ModelCosts, comparisons: Sequence[Comparison]) -> str:
    parts = [
        f"**{headline(costs)}**",
        "",
        *markdown_table(*site_table(costs)),
        "",
        *(f"* {line}" for line in footer(costs)),
    ]
    for comparison in comparisons:
        parts += ["", comparison.verdict, "", *markdown_table(*comparison.cells())]
    return "\n".join(parts)
