"""Cross-scale embedding (CEL) of CrossFormer (Wang et al. 2022, section 3.1): patches of several sizes at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError


class CrossScaleStem(nn.Module):
    """An image to a map of tokens, each of which saw patches of all ``kernel_sizes`` around one center.

    Args:
        in_chans: channels of the image.
        dim: of the map; see ``scale_widths``.
        kernel_sizes: ascending.
        stride: pixels a token; None is the smallest kernel.
        norm: whether a layer norm follows.

    Raises:
        ArgumentError: for kernels that have no common center, or a width that cannot be shared out.
    """

    def __init__(
        self,
        in_chans: int = 3,
        dim: int = 96,
        kernel_sizes: Sequence[int] = (4, 8, 16, 32),
        stride: int | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.projs = cross_scale_convs(in_chans, dim, kernel_sizes, kernel_sizes[0] if stride is None else stride)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, image: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, H // stride, W // stride, dim]``."""
        tokens = torch.cat([conv(image) for conv in self.projs], dim=1).permute(0, 2, 3, 1)
        return tokens if self.norm is None else self.norm(tokens)


class CrossScaleMerge(nn.Module):
    """A map to one of half its sides and twice its channels; the layer norm comes first.

    Args:
        dim: channels in.
        kernel_sizes: ascending.

    Raises:
        ArgumentError: as for ``CrossScaleStem``.
    """

    STRIDE = 2

    def __init__(self, dim: int, kernel_sizes: Sequence[int] = (2, 4)) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reductions = cross_scale_convs(dim, 2 * dim, kernel_sizes, self.STRIDE)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to ``[B, H / 2, W / 2, 2 * dim]``, odd sides rounded up (one more zero behind)."""
        height, width = source.shape[1:3]
        channels_first = self.norm(source).permute(0, 3, 1, 2)
        channels_first = F.pad(channels_first, (0, width % self.STRIDE, 0, height % self.STRIDE))
        return torch.cat([conv(channels_first) for conv in self.reductions], dim=1).permute(0, 2, 3, 1)


def cross_scale_convs(channels: int, dim: int, kernel_sizes: Sequence[int], stride: int) -> nn.ModuleList:
    """Convolutions of one stride and one center, whose outputs make ``dim`` channels together."""
    kernels = list(kernel_sizes)
    if not kernels or kernels != sorted(kernels) or any(size < stride or (size - stride) % 2 for size in kernels):
        raise ArgumentError(
            f"kernel_sizes: must ascend from stride={stride}, by even differences to share its center, got {kernels}"
        )
    return nn.ModuleList(
        nn.Conv2d(channels, width, size, stride, padding=(size - stride) // 2)
        for size, width in zip(kernels, scale_widths(dim, len(kernels)), strict=True)
    )


def scale_widths(dim: int, scales: int) -> list[int]:
    """Each scale has half the channels of the next smaller one, the last as many as the one before.

    Raises:
        ArgumentError: ``dim`` is no multiple of ``2 ** (scales - 1)``.
    """
    if dim % 2 ** (scales - 1):
        raise ArgumentError(f"dim: must be a multiple of {2 ** (scales - 1)} for {scales} kernel sizes, got {dim}")
    return [dim >> min(scale, scales - 1) for scale in range(1, scales + 1)]
