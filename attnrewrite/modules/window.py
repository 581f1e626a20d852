"""Attention inside the blocks of a partition of the map."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import grouped_attention
from ..ir import Grid, Window


class WindowAttention(nn.Module):
    """Swin's (shifted) window attention (Liu et al. 2021) without roll and mask: blocks are cut where they lie.

    It is neighborhood attention with a stride equal to the kernel size, with an offset and truncated border blocks.

    Args:
        window: block size, shift, and whether padded slots count as keys.
        scale: multiplies the scores.
        dropout: rate on the attention weights, in training.
    """

    def __init__(self, window: Window, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.window, self.scale, self.dropout = window, scale, dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        pad_key: Tensor | None = None,
        pad_value: Tensor | None = None,
    ) -> Tensor:
        """``[batch, height, width, heads, dim]`` maps; ``bias`` ``[heads, n, n]`` by slots of a block; ``pad_key`` and
        ``pad_value`` ``[heads, dim]`` stand in padded slots. Returns the map of mixed values."""
        bias = None if bias is None else bias.to(query.dtype)
        if self.training and self.dropout > 0.0:
            return self._with_dropout(query, key, value, bias, pad_key, pad_value)
        mixed = grouped_attention(
            query, key, value, self.window.size, self.window.shift, self.scale, bias, pad_key, pad_value
        )
        assert isinstance(mixed, Tensor)
        return mixed

    def _with_dropout(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        pad_key: Tensor | None,
        pad_value: Tensor | None,
    ) -> Tensor:
        """The fused operators have no dropout: gather the blocks and use dense attention."""
        grid = Grid(query.shape[1], query.shape[2])
        slots = self.window.slots(grid).to(query.device)
        blocks = [part.flatten(1, 2)[:, slots.clamp(min=0)] for part in (query, key, value)]
        if pad_key is not None and pad_value is not None:
            phantom = (slots == Window.PHANTOM)[:, :, None, None]
            blocks[1:] = [torch.where(phantom, pad, part) for pad, part in zip((pad_key, pad_value), blocks[1:], strict=True)]
        mask = torch.zeros(slots.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill(slots == Window.ABSENT, -math.inf)[:, None, None, :]
        mask = mask if bias is None else mask + bias
        mixed = F.scaled_dot_product_attention(
            *(part.transpose(2, 3) for part in blocks), mask, self.dropout, scale=self.scale
        ).transpose(2, 3)
        order = torch.argsort(slots.flatten(), stable=True)[-grid.tokens :]
        return mixed.flatten(1, 2)[:, order].unflatten(1, (grid.height, grid.width))

    def extra_repr(self) -> str:
        return f"{self.window}, scale={self.scale:.4g}, dropout={self.dropout}"
