"""Names that differ only in their numbers, written as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby


def numberless(text: str) -> str:
    """The same for texts that differ only in their numbers."""
    return re.sub(r"\d+", "#", text)


def folded_name(names: Sequence[str]) -> str:
    """``blocks.{0...3,5}.attn`` for names that are equal when ``numberless``; ``(root)`` for the empty name."""
    if len(names) == 1:
        return names[0] or "(root)"
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(parts[0] if len(set(parts)) == 1 else f"{{{_ranges(parts)}}}" for parts in columns)


def folded_names(names: Iterable[str]) -> list[str]:
    """Those that differ only in their numbers as one, in the order in which they come first."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(numberless(name), []).append(name)
    return [folded_name(alike) for alike in groups.values()]


def _ranges(parts: Sequence[str]) -> str:
    numbers = sorted({int(part) for part in parts})
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    bounds = [(run[0][1], run[-1][1]) for run in runs]
    return ",".join(str(first) if first == last else f"{first}...{last}" for first, last in bounds)
