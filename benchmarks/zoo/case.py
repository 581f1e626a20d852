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

    def inputs(self, batch: int) -> Tensor:
        shape = list(self.shape)
        shape.insert(self.batch_axis, batch)
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))
