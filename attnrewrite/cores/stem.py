"""From maps to tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ir.core import StageCore


class MapToTokens(StageCore):
    """``[batch, channels, height, width]`` to channels-last, as a map or (``flat``) as raster-ordered tokens."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, image: Tensor) -> Tensor:
        tokens = image.permute(0, 2, 3, 1)
        return tokens.flatten(1, 2) if self.flat else tokens


class GatherPatches(StageCore):
    """Non-overlapping patches of a channels-last map into channels (Swin's patch merging, Liu et al. 2021).

    Sides that the patch does not divide are padded with zeros at their end.

    Args:
        size: rows and columns of a patch.
        order: for every place in the channel order, which row-major position in the patch it is.
        grid: the map at conversion.
        flat: whether the result is ``[batch, patches, channels]`` rather than a map.
    """

    takes_sides = True

    def __init__(self, size: tuple[int, int], order: tuple[int, ...], grid: tuple[int, int], flat: bool) -> None:
        super().__init__()
        self.size, self.order, self.grid, self.flat = size, order, grid, flat

    def forward(self, source: Tensor, height: int = 0, width: int = 0) -> Tensor:
        """``[batch, height, width, channels]``, or tokens with their map's sides; channels by place first."""
        image = source if source.ndim == 4 else source.unflatten(1, (height, width))
        rows, columns = self.size
        short = (-image.shape[2] % columns, -image.shape[1] % rows)
        image = nn.functional.pad(image, (0, 0, 0, short[0], 0, short[1]))
        patches = image.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3).flatten(3, 4)
        patches = torch.stack([patches[:, :, :, place] for place in self.order], dim=3).flatten(3)
        return patches.flatten(1, 2) if self.flat else patches
