"""Tokens that come group by group to what works on them, and never lie as a map: torchvision's MaxViT normalises,
attends and runs its MLPs on ``[batch, groups, tokens, channels]``, which looks like a map and is none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..ir import Grid
from ..lift.dataflow import Dataflow
from ..lift.grid import token_cells
from ..lift.roles import NotSeparable


def true_map(source: Node, grid: Grid, queries: Tensor, flow: Dataflow) -> tuple[Grid, Tensor | None]:
    """The map behind ``source``, and the cell of every token where it does not hold that map in raster order.

    Groups that are the rows or columns of the supposed ``grid`` are what gives regrouped tokens away; they are looked up in the
    map that a convolution made of the image. Where there is none, the grid is believed.

    Args:
        queries: ``[groups, slots]`` tokens of ``source``, -1 for padding.

    Raises:
        NotSeparable: the tokens are known not to be a map, and some cells are missing or there twice.
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
        raise NotSeparable("the map that the windows are cut from is not known")
    return grid, cell


def cells_of(tokens: Tensor, place: Tensor | None) -> Tensor:
    """The cells of tokens; -1 stays."""
    return tokens if place is None else torch.where(tokens < 0, -1, place[tokens.clamp(min=0)])
