"""What a conversion would cost: its targets are asked for the cores they would install, and nothing is rewritten.

Sites, targets, options, classes and refusals are those of ``convert``; what only certification, rewriting or a run of
the rewritten module would refuse is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sympy import Integer

from ...errors import ConversionError
from ...ir.contract import Target
from ...ir.sites import AttentionSite
from ...planning.plan import PlannedSite
from ...planning.product_cost import macs_after, macs_before
from ...planning.stages import decided
from ..sites.converted_sites import converted_formula, core_name
from ..sites.model_formula import ModelFormula, lifted_without_hooks
from ..sites.site_reader import CountedSite
from .comparison import ComparedSite, Comparison
from .text import folded_name

if TYPE_CHECKING:
    from .report import Report

To = str | Target | Mapping[str, str | Target]


def converted_cost(report: Report, to: To, options: dict[str, Any], fidelity: str = "projected") -> Comparison:
    """Before and after the conversion that ``convert`` would make of the report's model.

    Raises:
        ArgumentError, CaptureError, ConversionError: as ``convert`` does.
    """
    made = report.formula.lifted or lifted_without_hooks(report.model, report.example)[0]
    plan = decided(made, to, fidelity, options)
    if not plan.converting:
        raise ConversionError(f"nothing to convert in {report.name}:\n{plan}")
    planned = {id(each.site): each for each in plan.sites}
    after, uncounted, reasons = [], 0, []
    for counted in report.sites:
        site, reason, more = _after(counted, planned.pop(id(counted.site), None), report)
        after.append(site)
        uncounted += more
        reasons.append((counted.name, reason))
    reasons += [(each.site.name, APART) for each in planned.values() if each.status == "convert"]
    return _comparison(report, _name_of(to, options), after, _notes(reasons), uncounted)


APART = "would be converted too, but has no cost of its own here"


def _notes(reasons: list[tuple[str, str]]) -> list[str]:
    """One for each reason and all sites that differ in numbers of their names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons:
        if reason:
            groups.setdefault((re.sub(r"\d+", "#", name), reason), []).append(name)
    return [f"{folded_name(names)} {reason}" for (_, reason), names in groups.items()]


def _after(counted: CountedSite, planned: PlannedSite | None, report: Report) -> tuple[CountedSite, str, int]:
    """The site after conversion, what there is to note, and MACs an image that no formula has."""
    if planned is None or planned.status == "untouched":
        return counted, "", 0
    if planned.conversion is None:
        return counted, f"is left as it is: {planned.why}", 0
    formula = converted_formula(counted, planned.conversion)
    if formula is not None:
        macs = formula.macs_of(report.batch, *report.size)
        return replace(counted, formula=formula, kind=formula.kind, macs=macs, why=""), "", 0
    core = core_name(planned.conversion)
    if not isinstance(planned.site, AttentionSite):
        return counted, f"becomes {core}, whose cost is not known: it is taken to cost what it does", 0
    products = macs_after(planned.site, planned.conversion)
    if products is None:
        return counted, f"becomes {core}, whose cost is not known: it is taken to cost what it does", 0
    more = products - macs_before(planned.site)
    note = f"becomes {core}, which has no formula: its products are counted at {report.size[0]}x{report.size[1]} only"
    return replace(counted, kind=core, macs=counted.macs + more), note, more // report.batch


def _comparison(report: Report, name: str, after: list[CountedSite], notes: list[str], uncounted: int) -> Comparison:
    formula = ModelFormula(
        after, report.formula.rest + Integer(uncounted), report.formula.rest_once, report.formula.rest_unit
    )
    rows = [
        ComparedSite(before.name, before, site, before.macs, site.macs)
        for before, site in zip(report.sites, after, strict=True)
    ]
    return Comparison((report.name, name), report.size, report.batch, rows, report.formula, formula, notes)


def _name_of(to: To, options: dict[str, Any]) -> str:
    if isinstance(to, str):
        return ", ".join([f'to="{to}"', *(f"{name}={value!r}" for name, value in options.items())])
    return f"to={dict(to)}" if isinstance(to, Mapping) else f"to={to!r}"
