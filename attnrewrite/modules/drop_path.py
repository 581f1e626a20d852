"""Stochastic depth (Huang et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, zero a residual branch for whole samples at ``rate``, and scale the others up to keep the mean."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """``[B, ...]`` to the same shape."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = torch.rand(branch.shape[0], *(1,) * (branch.ndim - 1), device=branch.device) < keep
        return branch * kept.to(branch.dtype) / keep

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Per stage and block: a linear ramp from 0 to ``rate`` over all blocks."""
    ramp = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())
    return [[next(ramp) for _ in range(depth)] for depth in depths]
