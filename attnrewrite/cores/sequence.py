"""Sequences of prefix tokens and a map: what the cores that need the map have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.core_formula import CoreSizes, core_formula
from ..algebra.site_formula import SiteFormula
from ..errors import ConversionError
from ..ir.core import AttentionCore
from ..ir.sites import Grid
from .neighborhood import grid_of


def split_map(part: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """``[batch, prefix + height * width, ...]`` to ``[batch, prefix, ...]`` and ``[batch, height, width, ...]``."""
    prefix = grid.prefix_tokens
    return part[:, :prefix], part[:, prefix:].unflatten(1, (grid.height, grid.width))


def join_map(prefix: Tensor, image: Tensor) -> Tensor:
    """The inverse of ``split_map``."""
    tokens = image.flatten(1, 2)
    return torch.cat([prefix, tokens], dim=1) if prefix.shape[1] else tokens


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Dense attention of heads-last ``[batch, tokens, heads, dim]`` operands; ``bias`` broadcasts to
    ``[batch, heads, queries, keys]``."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    bias = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale).transpose(1, 2)


class OfMap(AttentionCore):
    """A core of token sequences, on the maps that a windowed site gives."""

    def __init__(self, core: AttentionCore) -> None:
        super().__init__()
        self.core = core

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[batch, height, width, heads, dim]`` maps; ``bias`` ``[heads, n, n]`` of the one window that is the map."""
        parts = [part.flatten(1, 2) for part in (query, key, value)]
        mixed = self.core(*parts, None if bias is None else bias[None])
        return mixed.unflatten(1, query.shape[1:3])

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        return core_formula(self.core, sizes)


class InTokenOrder(AttentionCore):
    """A core of maps, on tokens that are given in another order, such as group by group.

    Args:
        core: of ``[batch, height, width, heads, dim]`` maps.
        place: ``[tokens]`` the cell of every token.
        grid: the map.
    """

    place: Tensor
    cells: Tensor
    grid: Grid

    def __init__(self, core: AttentionCore, place: Tensor, grid: Grid) -> None:
        super().__init__()
        self.core, self.grid = core, grid
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("cells", torch.argsort(place), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> Tensor:
        """``[batch, ..., heads, dim]`` with the tokens on the axes between; ``others`` are the core's.

        Raises:
            ConversionError: there are more or fewer tokens than at conversion.
        """
        axes = query.shape[1:-2]
        if axes.numel() != len(self.place):
            raise ConversionError(
                f"{axes.numel()} tokens, group by group, and where they lie was seen for {len(self.place)} alone; "
                "convert the model with example inputs of this size"
            )
        maps = [part.flatten(1, -3)[:, self.cells].unflatten(1, self._sides()) for part in (query, key, value)]
        return self.core(*maps, *others).flatten(1, 2)[:, self.place].unflatten(1, axes)

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        return core_formula(self.core, sizes)

    def _sides(self) -> tuple[int, int]:
        return self.grid.height, self.grid.width


__all__ = ["InTokenOrder", "OfMap", "attend", "grid_of", "join_map", "split_map"]
