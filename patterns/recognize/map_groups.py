"""Several groups of tokens: which windows or interleaved groups of which map they are.

The tokens need not lie as that map: torchvision's MaxViT normalizes, attends and runs its MLPs on ``[batch, groups,
tokens, channels]``, which looks like a map and is none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import Refusal
from ...graph.dataflow import Dataflow
from ...ir.sites import Grid, MapGroups
from ...lift.grid import token_cells
from ...lift.projections import Grouping
from .interleaved import recognize_interleaved
from .windows import recognize_window


def groups_of_map(
    source: Node, grid: Grid, grouped: Grouping, excluded: Tensor | None, likely: tuple[bool, bool], flow: Dataflow
) -> tuple[Grid, Tensor | None, MapGroups]:
    """The map, the cell of every token of ``source`` where they do not lie in its raster order, and the groups.

    Args:
        grid: the map that ``source`` seems to be.
        excluded, likely: as for ``recognize_window``.

    Raises:
        Refusal: the groups are none that are known, or their map is not known.
    """
    grid, place = _true_map(source, grid, grouped.queries, flow)
    queries, keys = (_cells_of(tokens, place) for tokens in (grouped.queries, grouped.keys))
    found = recognize_window(queries, keys, excluded, grid, likely)
    groups = found or recognize_interleaved(queries, keys, excluded, grid)
    if groups is None:
        raise Refusal(
            "the groups of tokens are neither windows of the map nor tokens at a fixed interval",
            "only such groups are supported",
        )
    return grid, place, groups


def _true_map(source: Node, grid: Grid, queries: Tensor, flow: Dataflow) -> tuple[Grid, Tensor | None]:
    """The map behind ``source``, and the cell of every token where it does not hold that map in raster order.

    Groups that are the rows or columns of the supposed ``grid`` are what gives regrouped tokens away; they are looked
    up in the map that a convolution made of the image. Where there is none, the grid is believed.
    """
    rows = torch.arange(grid.tokens).view(grid.height, grid.width)
    if not torch.equal(queries, rows) and not torch.equal(queries, rows.T):
        return grid, None
    found = token_cells(flow, source)
    if found is None:
        return grid, None
    grid, cell = found
    if torch.equal(cell, torch.arange(grid.tokens)):
        return grid, None
    if not torch.equal(cell.sort().values, torch.arange(grid.tokens)):
        raise Refusal(
            "the map that the windows are cut from is unknown", "compute the tokens by a convolution of the image"
        )
    return grid, cell


def _cells_of(tokens: Tensor, place: Tensor | None) -> Tensor:
    """The cells of tokens; -1 stays."""
    return tokens if place is None else torch.where(tokens < 0, -1, place[tokens.clamp(min=0)])
