"""A report as text: for terminals, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from ..algebra.symbols import plain
from ..count.cost import UNITS, scaled

if TYPE_CHECKING:
    from ..sites.site_reader import CountedSite
    from .comparison import ComparedSite, Comparison
    from .report import Report


@dataclass(frozen=True)
class SiteLine:
    """One or several alike sites: numbers are of all of them together."""

    name: str
    count: int
    site: CountedSite
    macs: int


def folded(sites: list[CountedSite]) -> Iterator[SiteLine]:
    """Sites that differ only in numbers of their names and cost the same share a line: ``blocks.{0…11}.attn``."""
    groups: dict[tuple[object, ...], list[CountedSite]] = {}
    for site in sites:
        formula = None if site.formula is None else site.formula.total
        groups.setdefault((re.sub(r"\d+", "#", site.name), site.kind, site.macs, formula), []).append(site)
    for members in groups.values():
        macs = sum(site.macs for site in members)
        yield SiteLine(folded_name([site.name for site in members]), len(members), members[0], macs)


def folded_name(names: list[str]) -> str:
    """``blocks.{0…11}.attn`` for names that differ in their numbers."""
    if len(names) == 1:
        return names[0] or "(root)"
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(parts[0] if len(set(parts)) == 1 else f"{{{_range(list(parts))}}}" for parts in columns)


def _range(parts: list[str]) -> str:
    numbers = sorted({int(part) for part in parts})
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    bounds = [(run[0][1], run[-1][1]) for run in runs]
    return ",".join(str(a) if a == b else f"{a}…{b}" for a, b in bounds)


COLUMNS = ("site", "×", "kind", "MAC", "%", "attn elements", "order", "formula (MAC an image)", "with")


def site_cells(report: Report, line: SiteLine) -> tuple[str, ...]:
    site, total = line.site, report.cost.macs
    share = f"{100 * line.macs / total:.1f}" if total else ""
    if site.formula is None:
        return (line.name, str(line.count), site.kind, scaled(line.macs).strip(), share, "", "", "counted only", "")
    formula = site.formula
    return (
        line.name, str(line.count), formula.kind, scaled(line.macs).strip(), share, _elements(report, line),
        formula.order, plain(formula.macs), definitions(site),
    )  # fmt: skip


def definitions(site: CountedSite) -> str:
    """The symbols of a site's formula: ``N = ⌊H/16⌋·⌊W/16⌋ + 1, C = 384``."""
    if site.formula is None:
        return ""
    used = site.formula.macs.free_symbols
    return ", ".join(f"{name} = {plain(value)}" for name, value in site.formula.values.items() if name in used)


def _elements(report: Report, line: SiteLine) -> str:
    formula = line.site.formula
    assert formula is not None
    elements = formula.number(formula.attention_map, *report.size)
    return scaled(elements * line.count * report.batch).strip() if elements else ""


def headline(report: Report) -> str:
    height, width = report.size
    return (
        f"analyze({report.name}) at {height}x{width}, batch {report.batch}, {report.dtype}: {scaled(report.total)}"
        f"{UNITS[report.convention]}, {report.parameters.total:,} parameters "
        f"({report.parameters.trainable:,} trainable)"
    )


def footer(report: Report) -> list[str]:
    """What is true of the whole model, and what is not counted: an empty list is a statement too."""
    cost = report.cost
    lines = [
        f"model: {plain(report.polynomial)} MAC an image on multiples of {report.lattice} px, {report.order}",
        *(f"check {check}" for check in report.checks),
        f"forward: {cost.macs:,} MAC, {cost.elementwise:,} elementwise operations, {cost.bytes_read:,} bytes read, "
        f"{cost.bytes_written:,} bytes written (unfused)",
        f"kept for backward, unfused: grows as {plain(report.dominant_memory)} elements an image",
        f"padding overhead: {padding_overhead(report):.1f} %; does not grow with the batch: "
        f"{scaled(report.formula.macs(0, *report.size))}MAC",
        *_defined(report),
        "not counted: " + ("; ".join(map(str, report.unsupported[:8])) or "nothing"),
    ]
    lines += [f"assumption: {note}" for note in report.assumptions] or ["assumptions: none"]
    return lines


def _defined(report: Report) -> list[str]:
    """Modules that are not counted by their operations."""
    modules = list(dict.fromkeys(report.trace.defined))
    if not modules:
        return []
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    executed = f"operations here contract {report.trace.executed:,} MAC in all"
    return [f"counted by definition: {', '.join(modules[:3])}{more} ({executed})"]


def padding_overhead(report: Report) -> float:
    """How much more than its envelope the model costs at this size, in percent: windows and strides that do not fit."""
    from ..algebra.symbols import H, W

    smooth = float(report.polynomial.subs({H: report.size[0], W: report.size[1]}))
    exact = report.formula.macs(1, *report.size)
    return 100 * (exact / smooth - 1) if smooth > 0 else 0.0


def terminal(report: Report) -> str:
    rows = [site_cells(report, line) for line in folded(report.sites)]
    lines = [headline(report), *aligned(COLUMNS, rows), *footer(report)]
    for comparison in report.comparisons:
        lines += ["", comparison_text(comparison)]
    return "\n".join(lines)


def aligned(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Columns padded with spaces; those of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(re.fullmatch(r"[-+\d.,  kMGT%]*", row[i]) for row in rows) for i in range(len(header))]
    table = []
    for row in (header, *rows):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        table.append("  ".join(cells).rstrip())
    return table


def markdown(report: Report) -> str:
    rows = [site_cells(report, line) for line in folded(report.sites)]
    parts = [
        f"**{headline(report)}**",
        "",
        *markdown_table(COLUMNS, rows),
        "",
        *(f"* {line}" for line in footer(report)),
    ]
    for comparison in report.comparisons:
        parts += ["", comparison.verdict, "", *markdown_table(*comparison_table(comparison))]
    return "\n".join(parts)


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def comparison_table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Rows that are alike are folded; the last row is the whole model."""
    header = ("site", "×", "before", "MAC", "after", "MAC", "change")
    rows = [_compared_cells(members) for members in _alike(comparison.rows)]
    before, after = comparison.before_macs, comparison.after_macs
    orders = comparison.orders
    total = ("total", "", orders[0], scaled(before).strip(), orders[1], scaled(after).strip(), _change(before, after))
    return header, [*rows, total]


def _alike(rows: list[ComparedSite]) -> list[list[ComparedSite]]:
    groups: dict[tuple[object, ...], list[ComparedSite]] = {}
    for row in rows:
        kinds = (row.before and row.before.kind, row.after and row.after.kind)
        groups.setdefault((re.sub(r"\d+", "#", row.name), kinds, row.before_macs, row.after_macs), []).append(row)
    return list(groups.values())


def _compared_cells(rows: list[ComparedSite]) -> tuple[str, ...]:
    first = rows[0]
    before, after = sum(row.before_macs for row in rows), sum(row.after_macs for row in rows)
    return (
        folded_name([row.name for row in rows]), str(len(rows)), first.before.kind if first.before else "",
        scaled(before).strip(), first.after.kind if first.after else "", scaled(after).strip(), _change(before, after),
    )  # fmt: skip


def _change(before: int, after: int) -> str:
    if before == after:
        return "0 %"
    return f"{100 * (after / before - 1):+.1f} %" if before else "new"


def comparison_text(comparison: Comparison) -> str:
    crossings = ", ".join(f"{side:.0f} px" for side in comparison.crossovers) or "none"
    return "\n".join(
        [
            f"{comparison.names[0]} -> {comparison.names[1]} at {comparison.size[0]}x{comparison.size[1]}",
            *aligned(*comparison_table(comparison)),
            f"equal cost on square images of: {crossings}",
            comparison.verdict,
            *(f"note: {note}" for note in comparison.notes),
        ]
    )
