"""Adaptive average pooling of channels-last maps, in a form that exports with sizes that are not yet known."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_average(source: Tensor, cells: tuple[int, int]) -> Tensor:
    """``[B, H, W, C]`` to ``[B, *cells, C]``, each the mean of its cell, as ``torch.nn.AdaptiveAvgPool2d`` cuts
    them."""
    rows, columns = cells
    by_row = _average(source.flatten(2), rows).unflatten(2, source.shape[2:])
    return _average(by_row.flatten(0, 1), columns).unflatten(0, by_row.shape[:2])


def cell_bounds(side: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First pixel of each cell, and the one after its last; where ``cells`` does not divide ``side`` they overlap."""
    cell = torch.arange(cells, device=device)
    return cell * side // cells, ((cell + 1) * side + cells - 1) // cells


def _average(source: Tensor, cells: int) -> Tensor:
    """``[batch, side, C]`` to ``[batch, cells, C]``."""
    start, end = cell_bounds(source.shape[1], cells, source.device)
    place = torch.arange(source.shape[1], device=source.device)
    inside = (place >= start[:, None]) & (place < end[:, None])
    # Ones are exact in every dtype, reciprocals of cell sizes are not; and bmm asks nothing about symbolic sizes.
    sums = torch.bmm(inside.to(source.dtype).expand(source.shape[0], -1, -1), source)
    return sums / (end - start)[:, None]
