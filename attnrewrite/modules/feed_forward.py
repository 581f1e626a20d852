"""The feed-forward network of a transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """``fc2(GELU(fc1(x)))`` on the last axis.

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, source: Tensor) -> Tensor:
        """``[..., dim]`` to the same shape."""
        return self.fc2(F.gelu(self.fc1(source)))
