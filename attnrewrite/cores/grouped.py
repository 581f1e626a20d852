"""CrossFormer's short and long distance attention in the place of dense or windowed attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sympy import Integer, sympify
from torch import Tensor, nn

from ..algebra.core_formula import CoreSizes
from ..algebra.site_formula import PAIRS, SiteFormula
from ..algebra.symbols import interval_pairs
from ..functional import grouped_attention
from ..ir.sites import Grid, Interleaved
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
        prefix = (keys, values) if grid.prefix_tokens else (None, None)
        image = grouped_attention(
            query_map, key_map, value_map, group, scale=self.scale, bias=self._bias(bias, group, query.dtype),
            interval=interval, additional_keys=prefix[0], additional_values=prefix[1],
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        assert isinstance(image, Tensor)
        return join_map(attend(first, key, value, None, self.scale) if first.shape[1] else first, image)

    def _bias(self, bias: Tensor | None, group: Pair, dtype: torch.dtype) -> Tensor | None:
        """``[heads, n, n]`` by places in a group, or None."""
        table = None if bias is None else bias[0]
        if self.position_bias is not None:
            own = self.position_bias(group)
            table = own if table is None else table + own
        return None if table is None else table.to(dtype)

    def seen(self, queries: Tensor) -> Tensor:
        grid = self.grid
        members = Interleaved(self.group, self.interval).slots(grid)
        group_of = torch.empty(grid.height * grid.width, dtype=torch.long)
        number = torch.arange(len(members))[:, None].expand_as(members)
        group_of[members[members >= 0]] = number[members >= 0]
        own = group_of[(queries - grid.prefix_tokens).clamp(min=0)]
        seen = F.pad(own[:, None] == group_of, (grid.prefix_tokens, 0), value=True)
        return seen | (queries < grid.prefix_tokens)[:, None]

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        """``2QC`` for ``Q`` pairs in groups, whose tokens see the prefix too; None with a position bias of its own."""
        if sizes.sides is None or self.position_bias is not None:
            return None
        height, width = sizes.sides
        prefix = self.grid.prefix_tokens
        rows, columns = (
            interval_pairs(side, Integer(group), Integer(interval))
            for side, group, interval in zip((height, width), self.group, self.interval, strict=True)
        )
        pairs = rows * columns + prefix * height * width + prefix * sympify(sizes.queries)
        return sizes.products("SDA" if self.interval == (1, 1) else "LDA", PAIRS, {PAIRS: pairs})

    def extra_repr(self) -> str:
        return f"group={self.group}, interval={self.interval}, grid={self.grid}, scale={self.scale:.4g}"


def fitted(group: Pair, interval: Pair, grid: Grid) -> tuple[Pair, Pair]:
    """A group no longer than the axis, and no interval where one group takes the whole axis."""
    sides = (grid.height, grid.width)
    rows, columns = (min(g, side) for g, side in zip(group, sides, strict=True))
    down, across = (i if g < side else 1 for g, i, side in zip(group, interval, sides, strict=True))
    return (rows, columns), (down, across)
