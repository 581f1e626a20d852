"""Interleaved groups: attention among tokens that lie at one interval, as in MaxViT's grid and CrossFormer's long
distance attention. Recognized, as windows are, from which tokens see which."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.sites import Grid, Interleaved
from .windows import seen_by_tokens, seen_in


def recognize_interleaved(queries: Tensor, keys: Tensor, excluded: Tensor | None, grid: Grid) -> Interleaved | None:
    """The interleaved groups that the given ones are, or None.

    Args:
        queries, keys: ``[groups, slots]`` tokens in raster order, -1 for padding.
        excluded: ``[groups, slots, slots]`` true where a constant mask rules the key out.
    """
    if not torch.equal(queries, keys):
        return None
    seen = seen_by_tokens(queries, keys, excluded, grid.height * grid.width)
    if seen is None:
        return None
    first = queries[(queries == 0).any(1)][0]
    for rows in range(1, len(first) + 1):
        found = _of_group(first, rows, grid)
        if found is not None and torch.equal(seen, seen_in(found, grid)):
            return found
    return None


def _of_group(first: Tensor, rows: int, grid: Grid) -> Interleaved | None:
    """What the group of the map's first token says, if it has so many rows; a single row or column has no interval."""
    columns = len(first) // rows
    if rows * columns != len(first) or rows > grid.height or columns > grid.width:
        return None
    down = int(first[columns]) // grid.width if rows > 1 else 1
    across = int(first[1]) if columns > 1 else 1
    return Interleaved((rows, columns), (down, across)) if down > 0 and across > 0 else None
