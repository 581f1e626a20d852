"""A report as one page that opens offline: inline style, inline SVG, no script, nothing loaded."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..algebra.symbols import H, W
from ..count.cost import scaled
from .curves import curves
from .svg import roofline_chart, scaling_chart
from .text import COLUMNS, comparison_table, folded, footer, headline, site_cells

if TYPE_CHECKING:
    from .report import ModuleCost, Report

_STYLE = """
.attnrewrite { color-scheme: light dark; --ink: #1b1f24; --faint: #d5dae1; --soft: #f4f6f8; --paper: #ffffff;
  font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
@media (prefers-color-scheme: dark) { .attnrewrite { --ink: #e6e9ed; --faint: #3a414b; --soft: #20252c;
  --paper: #14181d; } }
.attnrewrite main { max-width: 1100px; margin: 0 auto; padding: 24px; }
.attnrewrite h1 { font-size: 20px; } .attnrewrite h2 { font-size: 16px; margin-top: 28px; }
.attnrewrite .scroll { overflow-x: auto; }
.attnrewrite table { border-collapse: collapse; font-size: 13px; }
.attnrewrite th, .attnrewrite td { padding: 4px 10px; border-bottom: 1px solid var(--faint); text-align: left;
  white-space: nowrap; }
.attnrewrite th { background: var(--soft); }
.attnrewrite td.number, .attnrewrite th.number { text-align: right; font-variant-numeric: tabular-nums; }
.attnrewrite svg { width: 100%; max-width: 860px; height: auto; font: 12px system-ui, sans-serif; }
.attnrewrite svg text { fill: var(--ink); } .attnrewrite svg .grid { stroke: var(--faint); stroke-width: 0.7; }
.attnrewrite svg .frame { fill: none; stroke: var(--ink); } .attnrewrite svg .rule { stroke: var(--ink);
  stroke-dasharray: 4 4; } .attnrewrite svg .crossing { fill: var(--paper); stroke: var(--ink); stroke-width: 2; }
.attnrewrite details { margin-left: 18px; } .attnrewrite summary { cursor: pointer; }
.attnrewrite .leaf { margin-left: 32px; } .attnrewrite .verdict { background: var(--soft); padding: 10px 14px;
  border-left: 4px solid #2f6fde; }
"""

_NUMBERS = {"×", "MAC", "%", "attn elements", "change"}


def page(report: Report) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: cost</title></head>\n"
        f'<body style="margin: 0">{fragment(report)}</body>\n</html>\n'
    )


def fragment(report: Report) -> str:
    """The same for a notebook's cell."""
    parts = [f"<h1>{escape(headline(report))}</h1>"]
    parts += [f'<p class="verdict">{escape(comparison.verdict)}</p>' for comparison in report.comparisons]
    rows = [site_cells(report, line) for line in folded(report.sites)]
    parts += ["<h2>Sites</h2>", _table(COLUMNS, rows)]
    for comparison in report.comparisons:
        title = f"{comparison.names[0]} → {comparison.names[1]}"
        parts += [f"<h2>{escape(title)}</h2>", _table(*comparison_table(comparison))]
    parts += ["<h2>Scaling</h2>", _scaling(report)]
    if report.hardware is not None:
        roof = report.roofline()
        parts += [f"<h2>Roofline: {escape(roof.hardware.name)}, {roof.dtype}</h2>", roofline_chart(roof)]
        parts.append(f"<p>Lower bound of all parts one after another: {roof.seconds * 1e3:.3f} ms. "
                     f"Peaks: {escape(roof.hardware.source)}.</p>")  # fmt: skip
    parts += ["<h2>Modules</h2>", _tree(report)]
    notes = dict.fromkeys([*footer(report), *(note for found in report.comparisons for note in found.notes)])
    parts += ["<h2>Checks and assumptions</h2><ul>", *(f"<li>{escape(line)}</li>" for line in notes), "</ul>"]
    return f'<div class="attnrewrite"><style>{_STYLE}</style><main>{"".join(parts)}</main></div>'


def _scaling(report: Report) -> str:
    sides = [side for comparison in report.comparisons for side in comparison.crossovers]
    crossings = [(side, float(report.polynomial.subs({H: side, W: side}))) for side in sides]
    return scaling_chart(curves(report), crossings, report.size[0])


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    kinds = [' class="number"' if name in _NUMBERS else "" for name in header]
    head = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tree(report: Report) -> str:
    """Modules that contract, as nested folds; the first two levels are open."""
    rows = {module.name: module for module in report.modules if module.cost.macs}
    children: dict[str, list[str]] = {}
    for name in rows:
        if name:
            children.setdefault(_parent(name, rows), []).append(name)
    return _branch("", rows, children, report.cost.macs, 0) if "" in rows else "<p>Nothing contracts.</p>"


def _parent(name: str, rows: dict[str, ModuleCost]) -> str:
    while name:
        name = name.rpartition(".")[0]
        if name in rows:
            return name
    return ""


def _branch(name: str, rows: dict[str, ModuleCost], children: dict[str, list[str]], total: int, depth: int) -> str:
    row = rows[name]
    label = (
        f"<b>{escape(name or '(root)')}</b> {escape(row.kind)}: {scaled(row.cost.macs)}MAC, "
        f"{100 * row.cost.macs / total:.1f} %, {row.parameters:,} parameters"
    )
    inside = children.get(name, [])
    if not inside:
        return f'<div class="leaf">{label}</div>'
    below = "".join(_branch(child, rows, children, total, depth + 1) for child in inside)
    return f"<details{' open' if depth < 1 else ''}><summary>{label}</summary>{below}</details>"
