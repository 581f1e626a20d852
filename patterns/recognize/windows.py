"""Windows: attention inside the blocks of a partition of the map, shifted or not, padded or not.

Recognized from which tokens see which: whether a library rolls and masks, pads before or after the roll, or cuts the
blocks directly makes no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.sites import Grid, MapGroups, Window


def recognize_window(
    queries: Tensor, keys: Tensor, excluded: Tensor | None, grid: Grid, likely: tuple[bool, bool] = (False, False)
) -> Window | None:
    """The window whose blocks are the given groups, or None.

    Args:
        queries, keys: ``[groups, slots]`` tokens in raster order, -1 for padding.
        excluded: ``[groups, slots, slots]`` true where a constant mask rules the key out.
        likely: whether it has padding keys and is rolled before padding, for maps on which that cannot be seen.
    """
    if not torch.equal(queries, keys):
        return None
    tokens, count = grid.height * grid.width, queries.shape[1]
    seen = seen_by_tokens(queries, keys, excluded, tokens)
    if seen is None:
        return None
    slot, corner = int(torch.nonzero(queries == 0)[0, 1]), int(queries[0, 0])
    sides = [n for n in range(1, count + 1) if count % n == 0]
    for rows in sorted(sides, key=lambda side: abs(side - count // side)):  # most windows are square
        columns = count // rows
        offset = (-(slot // columns) % rows, -(slot % columns) % columns)
        rolled = (corner // grid.width % rows, corner % grid.width % columns)
        for padding_keys, rolled_first in (likely, (True, False), (True, True), (False, False), (False, True)):
            window = Window((rows, columns), rolled if rolled_first else offset, padding_keys, rolled_first)
            if torch.equal(seen, seen_in(window, grid)):
                return window
    return None


def seen_by_tokens(queries: Tensor, keys: Tensor, excluded: Tensor | None, tokens: int) -> Tensor | None:
    """``[tokens, slots]``: what every token sees in every slot; None unless each token queries exactly once."""
    visible = torch.where(keys < 0, Window.PADDING, keys)[:, None, :].expand(-1, queries.shape[1], -1)
    if excluded is not None:
        visible = torch.where(excluded, Window.ABSENT, visible)
    real = queries >= 0
    if not torch.equal(queries[real].sort().values, torch.arange(tokens)):
        return None
    seen = torch.empty(tokens, keys.shape[1], dtype=torch.long)
    seen[queries[real]] = visible[real]
    return seen


def seen_in(groups: MapGroups, grid: Grid) -> Tensor:
    """``[tokens, slots]``: what every token sees in every slot of its group."""
    slots = groups.slots(grid)
    seen = torch.empty(grid.height * grid.width, slots.shape[1], dtype=torch.long)
    block, slot = torch.nonzero(slots >= 0, as_tuple=True)
    seen[slots[block, slot]] = slots[block]
    return seen
