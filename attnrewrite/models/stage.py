"""What the hierarchical models are made of."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Stage(nn.Module):
    """Blocks of one width, and what leads to the next stage, under their official names."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, H, W, C]`` to what the last block gives, and to that downsampled, if there is a next stage."""
        for block in self.blocks:
            source = block(source)
        return source, source if self.downsample is None else self.downsample(source)


def stage_maps(stages: Iterable[nn.Module], source: Tensor) -> list[Tensor]:
    """What the last block of each ``Stage`` gives, ``[B, H, W, C]``, of the map before the first."""
    maps = []
    for stage in stages:
        last, source = stage(source)
        maps.append(last)
    return maps
