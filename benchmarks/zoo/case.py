"""One model of the sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model and the shape of one sample of its input; ``batch_axis`` is where the samples are stacked."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_axis: int = 0

    def inputs(self, batch: int, sides: tuple[int, int] | None = None) -> Tensor:
        """``batch`` samples; with other ``sides`` of the image if they are given."""
        shape = list(self.shape)
        if sides is not None:
            shape[-2:] = sides
        shape.insert(self.batch_axis, batch)
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))

    @property
    def other_sides(self) -> list[tuple[int, int]]:
        """A larger and wider image, and one of sides that nothing divides."""
        if len(self.shape) < 3:
            return []
        height, width = self.shape[-2:]
        return [(height + 32, width + 64), (height + 16, width), (height + 21, width + 10)]
