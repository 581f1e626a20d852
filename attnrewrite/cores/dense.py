"""Attention of every query to every key."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..algebra.core_formula import CoreSizes
from ..algebra.site_formula import N, P, SiteFormula
from ..ir.core import AttentionCore


class DenseAttention(AttentionCore):
    """``softmax(scale * q k^T + bias) v`` (Vaswani et al. 2017).

    Args:
        scale: multiplies the scores.
        dropout: rate on the attention weights, in training.
    """

    keeps_weights = True

    def __init__(self, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Heads-last ``[batch, queries, heads, dim]`` and keys likewise; ``bias`` broadcasts over
        ``[batch, heads, queries, keys]``. Returns ``[batch, queries, heads, value_dim]``."""
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        bias = None if bias is None else bias.to(query.dtype)
        rate = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, bias, rate, scale=self.scale).transpose(1, 2)

    def formula(self, sizes: CoreSizes) -> SiteFormula:
        """``2NPC``."""
        return sizes.products("SA", N * P)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, dropout={self.dropout}"
