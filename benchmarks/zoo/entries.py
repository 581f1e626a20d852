"""Entries of the tables of models."""

from __future__ import annotations

from typing import Any

Entry = tuple[str, str, int, dict[str, Any]]
"""Name, variant, side of the image, and what makes the model small."""


def alike(side: int, options: dict[str, Any], *names: str) -> list[Entry]:
    """Models without variants that the same options make small."""
    return [(name, "", side, options) for name in names]
