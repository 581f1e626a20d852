"""CrossFormer's short and long distance attention in the place of dense or windowed attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ir.sites import Grid
from .exactness import ExactWhereHeld
from .sequence import attend, grid_of, join_map, split_map

Pair = tuple[int, int]


class GroupedCore(ExactWhereHeld):
    """Attention inside groups of ``group`` tokens that lie ``interval`` apart (Wang et al. 2022, CrossFormer, section
    3.2; interval 1 is short distance), for ``[prefix, map]`` sequences. Every group also sees the prefix tokens, and
    prefix tokens see everything. Padded slots are not attended to.

    Args:
        group, interval: tokens per axis; a group longer than an axis takes the whole axis.
        grid: the map and prefix at conversion.
        scale: multiplies the scores.
        dropout: rate on the attention weights, in training.
        position_bias: gives ``[heads, n, n]`` for a group of given size, added to the scores.
    """

    only_weighs_values = True
    grid: Grid

    def __init__(
        self,
        group: Pair,
        interval: Pair,
        grid: Grid,
        scale: float,
        dropout: float = 0.0,
        position_bias: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.group, self.interval, self.grid = group, interval, grid
        self.scale, self.dropout, self.position_bias = scale, dropout, position_bias

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]``; ``bias`` ``[1, heads, n, n]`` by places in a group."""
        grid = grid_of(query.shape[1], self.grid)
        group, interval = fitted(self.group, self.interval, grid)
        self.hold(group == (grid.height, grid.width) or grid in self.grid.seen, grid)
        (first, query_map), (keys, key_map), (values, value_map) = (
            split_map(part, grid) for part in (query, key, value)
        )
        queries = into_groups(query_map, group, interval)
        count = queries.shape[1]
        grouped_keys, grouped_values = (
            torch.cat([own[:, None].expand(-1, count, -1, -1, -1), into_groups(image, group, interval)], dim=2)
            for own, image in ((keys, key_map), (values, value_map))
        )
        added = self._bias(bias, group, grid, interval, queries)
        rate = self.dropout if self.training else 0.0
        operands = (queries.flatten(0, 1), grouped_keys.flatten(0, 1), grouped_values.flatten(0, 1))
        mixed = attend(operands[0], operands[1], operands[2], added, self.scale, rate)
        image = from_groups(mixed.unflatten(0, (-1, count)), (grid.height, grid.width), group, interval)
        return join_map(attend(first, key, value, None, self.scale) if first.shape[1] else first, image)

    def _bias(self, bias: Tensor | None, group: Pair, grid: Grid, interval: Pair, queries: Tensor) -> Tensor | None:
        """``[batch * groups or 1, heads, n, prefix + n]``, or None."""
        table = None if bias is None else bias[0]
        if self.position_bias is not None:
            own = self.position_bias(group)
            table = own if table is None else table + own
        padded = any(side % (g * i) for side, g, i in zip((grid.height, grid.width), group, interval, strict=True))
        if table is None and not padded:
            return None
        total = queries.new_zeros(1, 1, group[0] * group[1], group[0] * group[1]) if table is None else table[None]
        if padded:
            real = into_groups(queries.new_ones(1, grid.height, grid.width, 1, 1), group, interval)[0, :, :, 0, 0] > 0
            real = real | ~real.any(
                dim=1, keepdim=True
            )  # padding alone is cut off later, but must be finite
            absent = queries.new_zeros(real.shape).masked_fill(~real, -math.inf)
            total = total + absent[:, None, None, :]
            total = total.repeat(queries.shape[0], 1, 1, 1)
        return F.pad(total, (grid.prefix_tokens, 0))

    def seen(self, queries: Tensor) -> Tensor:
        grid = self.grid
        place = torch.arange(1, grid.height * grid.width + 1).view(1, grid.height, grid.width, 1, 1)
        members = into_groups(place, self.group, self.interval)[0, :, :, 0, 0] - 1
        group_of = torch.empty(grid.height * grid.width, dtype=torch.long)
        number = torch.arange(len(members))[:, None].expand_as(members)
        group_of[members[members >= 0]] = number[members >= 0]
        own = group_of[(queries - grid.prefix_tokens).clamp(min=0)]
        seen = F.pad(own[:, None] == group_of, (grid.prefix_tokens, 0), value=True)
        return seen | (queries < grid.prefix_tokens)[:, None]

    def extra_repr(self) -> str:
        return f"group={self.group}, interval={self.interval}, grid={self.grid}, scale={self.scale:.4g}"


def fitted(group: Pair, interval: Pair, grid: Grid) -> tuple[Pair, Pair]:
    """A group no longer than the axis, and no interval where one group takes the whole axis."""
    sides = (grid.height, grid.width)
    rows, columns = (min(g, side) for g, side in zip(group, sides, strict=True))
    down, across = (i if g < side else 1 for g, i, side in zip(group, interval, sides, strict=True))
    return (rows, columns), (down, across)


def into_groups(image: Tensor, group: Pair, interval: Pair) -> Tensor:
    """``[batch, height, width, ...]`` to ``[batch, groups, n, ...]``, padded with zeros at the end of each axis.

    Place ``c`` of an axis is in region ``c // (group * interval)`` and, there, in the group ``c % interval``.
    """
    short = [-side % (g * i) for side, g, i in zip(image.shape[1:3], group, interval, strict=True)]
    image = F.pad(image, (0, 0) * (image.ndim - 3) + (0, short[1], 0, short[0]))
    image = image.unflatten(2, (-1, group[1], interval[1])).unflatten(1, (-1, group[0], interval[0]))
    # batch, region row, place row, group row, region column, place column, group column
    image = image.permute(0, 1, 3, 4, 6, 2, 5, *range(7, image.ndim))
    return image.flatten(5, 6).flatten(1, 4)


def from_groups(groups: Tensor, sides: Pair, group: Pair, interval: Pair) -> Tensor:
    """The inverse of ``into_groups``."""
    regions = [-(-side // (g * i)) for side, g, i in zip(sides, group, interval, strict=True)]
    image = groups.unflatten(2, group).unflatten(1, (regions[0], interval[0], regions[1], interval[1]))
    image = image.permute(0, 1, 5, 2, 3, 6, 4, *range(7, image.ndim))
    return image.flatten(4, 6).flatten(1, 3)[:, : sides[0], : sides[1]]
