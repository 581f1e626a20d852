"""A report as data: plain dictionaries, and JSON as the contract for other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sympy
from sympy import Expr

from ...algebra.symbols import plain
from ..sites.counted_site import CountedSite
from .comparison import Comparison
from .model_costs import ModelCosts

SCHEMA_VERSION = 1


def as_json(costs: ModelCosts, comparisons: Sequence[Comparison]) -> str:
    return json.dumps(as_dict(costs, comparisons), indent=2, ensure_ascii=False, allow_nan=False)


def as_dict(costs: ModelCosts, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """All of a report in types that JSON has."""
    height, width = costs.size
    return {
        "schema_version": SCHEMA_VERSION,
        "model": costs.name,
        "input": {"height": height, "width": width, "batch": costs.batch, "dtype": costs.dtype},
        "convention": costs.convention,
        "total": costs.total,
        "cost": asdict(costs.cost),
        "parameters": asdict(costs.parameters),
        "macs": expression(costs.expression),
        "polynomial": {"lattice": costs.lattice, **expression(costs.polynomial)},
        "order": costs.order,
        "sites": records(costs),
        "modules": [
            {"name": m.name, "kind": m.kind, "calls": m.calls, "parameters": m.parameters, **asdict(m.cost)}
            for m in costs.modules
        ],
        "checks": [{**asdict(check), "equal": check.equal} for check in costs.checks],
        "unsupported": [str(operation) for operation in costs.unsupported],
        "assumptions": costs.assumptions,
        "comparisons": [comparison(found) for found in comparisons],
    }


def expression(value: Expr) -> dict[str, str]:
    """For programs, for people, and for papers; the functions in them are those of ``algebra.symbols``."""
    return {"srepr": sympy.srepr(value), "text": plain(value), "latex": sympy.latex(value)}


def records(costs: ModelCosts) -> list[dict[str, Any]]:
    """One dictionary a site."""
    return [_record(costs, site) for site in costs.sites]


def _record(costs: ModelCosts, site: CountedSite) -> dict[str, Any]:
    record: dict[str, Any] = {"name": site.name, "kind": site.kind, "source": site.describe, "macs": site.macs}
    if site.formula is None:
        return {**record, "formula": None, "why": site.why}
    formula = site.formula
    numbers = {name: formula.number(getattr(formula, name), *costs.size) for name in ("attention_map", "saved", "once")}
    return {
        **record,
        **numbers,
        "order": formula.order,
        "formula": expression(formula.macs),
        "symbols": {str(name): expression(value) for name, value in formula.values.items()},
    }


def comparison(compared: Comparison) -> dict[str, Any]:
    return {
        "names": list(compared.names),
        "before": compared.before_macs,
        "after": compared.after_macs,
        "orders": list(compared.orders),
        "crossovers": compared.crossovers,
        "verdict": compared.verdict,
        "notes": compared.notes,
        "sites": [
            {
                "name": row.name,
                "before": None if row.before is None else row.before.kind,
                "after": None if row.after is None else row.after.kind,
                "before_macs": row.before_macs,
                "after_macs": row.after_macs,
                "formula": None
                if row.after is None or row.after.formula is None
                else expression(row.after.formula.macs),
            }
            for row in compared.rows
        ],
    }
