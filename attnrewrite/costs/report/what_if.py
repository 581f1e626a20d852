"""What a conversion would cost: its targets are asked for the cores they would install, and nothing is rewritten.

Sites, targets, options, classes and refusals are those of ``convert``; what only certification, rewriting or a run of
the rewritten module would refuse is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sympy import Integer

from ...errors import ConversionError
from ...ir.sites import AttentionSite
from ...planning.planned_site import PlannedSite
from ...planning.product_cost import macs_after, macs_before
from ...planning.stages import To, decided
from ...reports.names import folded_name, numberless
from ..sites.converted_sites import converted_formula, core_name
from ..sites.counted_site import CountedSite
from ..sites.model_formula import ModelFormula, lifted_without_hooks
from .comparison import ComparedSite, Comparison
from .model_costs import ModelCosts


def converted_cost(costs: ModelCosts, to: To, options: dict[str, Any], fidelity: str = "projected") -> Comparison:
    """Before and after the conversion that ``convert`` would make of the report's model.

    Raises:
        ArgumentError, CaptureError, ConversionError: as ``convert`` does.
    """
    made = costs.formula.lifted or lifted_without_hooks(costs.model, costs.example)
    plan = decided(made, to, fidelity, options)
    if not plan.converting:
        raise ConversionError(f"nothing to convert in {costs.name}:\n{plan}")
    planned = {id(each.site): each for each in plan.sites}
    after, uncounted, reasons = [], 0, []
    for counted in costs.sites:
        site, reason, more = _after(counted, planned.pop(id(counted.site), None), costs)
        after.append(site)
        uncounted += more
        reasons.append((counted.name, reason))
    reasons += [(each.site.name, APART) for each in planned.values() if each.status == "convert"]
    return _comparison(costs, _name_of(to, options), after, _notes(reasons), uncounted)


APART = "would be converted too, but has no cost of its own here"


def _notes(reasons: list[tuple[str, str]]) -> list[str]:
    """One for each reason and all sites that differ in numbers of their names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons:
        if reason:
            groups.setdefault((numberless(name), reason), []).append(name)
    return [f"{folded_name(names)} {reason}" for (_, reason), names in groups.items()]


def _after(counted: CountedSite, planned: PlannedSite | None, costs: ModelCosts) -> tuple[CountedSite, str, int]:
    """The site after conversion, what there is to note, and MACs per image that no formula has."""
    if planned is None or planned.status == "untouched":
        return counted, "", 0
    if planned.conversion is None:
        return counted, f"is left as it is: {planned.why}", 0
    formula = converted_formula(counted, planned.conversion)
    if formula is not None:
        macs = formula.macs_of(costs.batch, *costs.size)
        return replace(counted, formula=formula, kind=formula.kind, macs=macs, why=""), "", 0
    core = core_name(planned.conversion)
    site, conversion = planned.site, planned.conversion
    if isinstance(site, AttentionSite) and (products := macs_after(site, conversion)) is not None:
        more = products - macs_before(site)
        note = f"becomes {core}, which has no formula: its products are counted at {costs.size[0]}x{costs.size[1]} only"
        return replace(counted, kind=core, macs=counted.macs + more), note, more // costs.batch
    return counted, f"becomes {core}, whose cost is not known: it is taken to cost what it does", 0


def _comparison(costs: ModelCosts, name: str, after: list[CountedSite], notes: list[str], uncounted: int) -> Comparison:
    formula = ModelFormula(
        after, costs.formula.rest + Integer(uncounted), costs.formula.rest_once, costs.formula.rest_unit
    )
    rows = [
        ComparedSite(before.name, before, site, before.macs, site.macs)
        for before, site in zip(costs.sites, after, strict=True)
    ]
    return Comparison((costs.name, name), costs.size, costs.batch, rows, costs.formula, formula, notes)


def _name_of(to: To, options: dict[str, Any]) -> str:
    if isinstance(to, str):
        return ", ".join([f'to="{to}"', *(f"{name}={value!r}" for name, value in options.items())])
    return f"to={dict(to)}" if isinstance(to, Mapping) else f"to={to!r}"
