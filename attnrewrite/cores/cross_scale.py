"""Cross-scale embeddings (CrossFormer, Wang et al. 2022, section 3.1) in the place of stems and merges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ir.sites import Grid
from ..modules.cross_scale import cross_scale_convs
from .sequence import grid_of
from .stem import GatherPatches


class CrossScaleConv(nn.Module):
    """Convolutions of several sizes about one center, with as many results as the one convolution that they replace.

    Args:
        channels, dim: channels in and out.
        kernel_sizes: ascending.
        kernel_size, stride, padding: of the convolution that is replaced.
        order: for every channel of the result, which channel of the concatenated scales it is; None is theirs.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        kernel_sizes: Sequence[int],
        kernel_size: int,
        stride: int,
        padding: int,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.projs = cross_scale_convs(channels, dim, kernel_sizes, stride)
        self.register_buffer("order", order)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to ``[B, dim, H', W']``."""
        height, width = image.shape[-2:]
        rows, columns = self._steps(height), self._steps(width)
        right, below = (columns * self.stride - width, rows * self.stride - height)
        image = F.pad(image, (0, torch.sym_max(right, 0), 0, torch.sym_max(below, 0)))
        scales = torch.cat([conv(image)[..., :rows, :columns] for conv in self.projs], dim=1)
        return scales[:, self.order] if isinstance(self.order, Tensor) else scales

    def _steps(self, side: int) -> int:
        return (side + 2 * self.padding - self.kernel_size) // self.stride + 1

    def extra_repr(self) -> str:
        return f"replaces kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class CrossScalePatches(nn.Module):
    """The same for a linear map of gathered patches, whose layer norm stays that of a whole patch (Swin's merge).

    The patches do not overlap, so that normalized they make a map again, of which the convolutions take larger parts.

    Args:
        gather: cuts the map into patches.
        channels, dim: channels of the map and of the result.
        kernel_sizes: ascending.
        norm: of a patch, if there is one.
        grid: where token sequences lie; None if maps are given.
    """

    def __init__(
        self,
        gather: GatherPatches,
        channels: int,
        dim: int,
        kernel_sizes: Sequence[int],
        norm: nn.LayerNorm | None,
        grid: Grid | None,
    ) -> None:
        super().__init__()
        self.gather, self.norm, self.grid = gather, norm, grid
        self.projs = cross_scale_convs(channels, dim, kernel_sizes, gather.size[0])

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, channels]`` to ``[B, H', W', dim]``; tokens ``[B, H * W, channels]`` to tokens."""
        if self.grid is not None:
            grid = grid_of(source.shape[1], self.grid)
            source = source.unflatten(1, (grid.height, grid.width))
        patches = self.gather(source)
        if self.norm is not None:
            patches = self.norm(patches)
        image = self._spread(patches)
        scales = torch.cat([conv(image) for conv in self.projs], dim=1).permute(0, 2, 3, 1)
        return scales if self.grid is None else scales.flatten(1, 2)

    def _spread(self, patches: Tensor) -> Tensor:
        """``[B, H', W', places * channels]`` to the map ``[B, channels, H, W]`` that the patches were cut from."""
        rows, columns = self.gather.size
        places = patches.unflatten(-1, (rows * columns, -1)).unbind(3)
        ordered = [places[self.gather.order.index(place)] for place in range(rows * columns)]
        boxes = torch.stack(ordered, dim=3).unflatten(3, (rows, columns))
        return boxes.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
