"""Depthwise convolution of channels-last maps."""

from __future__ import annotations

from torch import Tensor, nn


class DepthwiseConv(nn.Module):
    """One ``kernel_size`` x ``kernel_size`` filter a channel, stride 1, zero padded to the same size, with bias."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, channels]`` to the same shape."""
        return self.conv(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
