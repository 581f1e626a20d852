"""Tables as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

Row = Sequence[str]


def aligned(columns: Row, rows: Sequence[Row]) -> list[str]:
    """Lines whose columns are padded with spaces; columns of numbers are flush right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    right = [all(re.fullmatch(r"[-+\d.,  kMGT%]*", row[i]) for row in rows) for i in range(len(columns))]
    table = []
    for row in (columns, *rows):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        table.append("  ".join(cells).rstrip())
    return table


def markdown_table(columns: Row, rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table; a bar inside a cell is escaped."""
    lines = [columns, ("---",) * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
