"""The feed-forward network of RMT."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import DepthwiseConv


class ConvFFN(nn.Module):
    """``fc2(a + DWConv3x3(a))`` with ``a = GELU(fc1(x))`` (RMT, Fan et al. 2024, code of June 2024).

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
        conv: False leaves the convolution out: a plain MLP, as in the paper and the code of December 2023.
    """

    def __init__(self, dim: int, hidden_dim: int, conv: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim, 3) if conv else None
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape."""
        hidden = F.gelu(self.fc1(source))
        if self.dwconv is not None:
            hidden = hidden + self.dwconv(hidden)
        return self.fc2(hidden)
