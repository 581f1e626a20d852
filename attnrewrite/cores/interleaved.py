"""Attention inside interleaved groups of a map, kept as it was."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConversionError
from ..ir.sites import Grid, Interleaved
from .grouped import GroupedCore
from .sequence import OfMap


class InterleavedAttention(OfMap):
    """MaxViT's grid attention (Tu et al. 2022) and its like: groups of tokens that lie an interval apart.

    On a larger map the groups may have more tokens, lie further apart, or be more; one map does not tell which, so
    another one is refused.

    Args:
        keys: the groups.
        grid: the map at conversion.
        scale: multiplies the scores.
        dropout: rate on the attention weights, in training.
    """

    keeps_weights = True
    grid: Grid

    def __init__(self, keys: Interleaved, grid: Grid, scale: float, dropout: float = 0.0) -> None:
        super().__init__(GroupedCore(keys.group, keys.interval, grid, scale, dropout))
        self.keys, self.grid = keys, grid

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[batch, height, width, heads, dim]`` maps; ``bias`` ``[heads, n, n]`` by slots of a group. Returns the
        map of mixed values.

        Raises:
            ConversionError: the map is not the one at conversion.
        """
        sides = query.shape[1:3]
        if tuple(sides) != (self.grid.height, self.grid.width):
            raise ConversionError(
                f"groups of {self.keys} on a {self.grid} map, and whether those of a {sides[0]}x{sides[1]} one have "
                "more tokens or a longer interval differs from model to model; convert the model with example inputs "
                "of this size"
            )
        return super().forward(query, key, value, bias)

    def extra_repr(self) -> str:
        return f"{self.keys}, grid={self.grid}"
