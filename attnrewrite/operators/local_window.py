"""Attention scores and averages over a square window around every pixel, cut off at the border of the map.

Both work on shifted slices of a padded map, so that keys and values are never copied once a place in the window.
Places are in row-major order; place ``o`` of a window of ``k`` is the pixel ``(o // k - k // 2, o % k - k // 2)`` away.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def window_scores(query: Tensor, key: Tensor, window_size: int) -> Tensor:
    """``[B, heads, H, W, head_dim]`` both, to ``[B, heads, H, W, window_size ** 2]``; 0 beyond the border."""
    return torch.stack([(query * shifted).sum(-1) for shifted in _shifts(key, window_size)], dim=-1)


def window_average(weights: Tensor, value: Tensor, window_size: int) -> Tensor:
    """Sum of the window's values by ``weights`` ``[B, heads, H, W, window_size ** 2]``; beyond the border they are 0.

    The result is ``[B, heads, H, W, head_dim]`` like ``value``.
    """
    total = torch.zeros_like(value)
    for weight, shifted in zip(weights.unbind(-1), _shifts(value, window_size), strict=True):
        total = total + weight[..., None] * shifted
    return total


def inside_map(height: int, width: int, window_size: int, device: torch.device) -> Tensor:
    """``[H * W, window_size ** 2]``: which places of each pixel's window are on the map."""
    rows, columns = (_inside_axis(side, window_size, device) for side in (height, width))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def _inside_axis(side: int, window_size: int, device: torch.device) -> Tensor:
    reach = window_size // 2
    place = torch.arange(side, device=device)[:, None] + torch.arange(-reach, reach + 1, device=device)
    return (place >= 0) & (place < side)


def _shifts(source: Tensor, window_size: int) -> Iterator[Tensor]:
    """A view of the map for every place in the window."""
    height, width = source.shape[2:4]
    reach = window_size // 2
    padded = F.pad(source, (0, 0, reach, reach, reach, reach))
    for row in range(window_size):
        for column in range(window_size):
            yield padded.narrow(2, row, height).narrow(3, column, width)
