"""The block of a plain vision transformer (Dosovitskiy et al. 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .drop_path import DropPath
from .feed_forward import FeedForward
from .heads import require_heads


class SelfAttention(nn.Module):
    """Softmax attention over all tokens.

    Args:
        dim: channels in and out.
        num_heads: must divide ``dim``.
        qkv_bias: whether query, key and value have a bias.
        scale: of the dot products; None is ``head_dim ** -0.5``.

    Raises:
        ArgumentError: if the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, scale: float | None = None) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.num_heads, self.scale = num_heads, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, dim]`` to the same shape."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward network, each normalized before and added to its input.

    Args:
        dim, num_heads, qkv_bias, scale: as in ``SelfAttention``.
        mlp_ratio: hidden channels of the feed-forward network over ``dim``.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, dim]`` to the same shape."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))
