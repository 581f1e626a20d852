"""A table in Markdown, shown line by line as it is measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def show(header: str, rows: Iterable[str], output: Path | None) -> None:
    """Print ``header`` and each of ``rows`` when it is there; in the end write them to ``output``, too."""
    lines = header
    print(header, end="")
    for row in rows:
        lines += row + "\n"
        print(row, flush=True)
    if output is not None:
        output.write_text(lines)
