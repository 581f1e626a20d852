"""Neighborhood attention as masked attention, by the rule as it is published."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attnrewrite.ir.sites import Grid
from attnrewrite.operators.index_rule import axis_mask


def dilated_mask(kernel: tuple[int, int], dilation: tuple[int, int], grid: Grid) -> torch.Tensor:
    """``[tokens, tokens]``: which keys each query sees, prefix tokens included, by the library's rule of an axis."""
    rows, columns = (
        axis_mask(side, side, k, d) for side, k, d in zip((grid.height, grid.width), kernel, dilation, strict=True)
    )
    seen = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(grid.height * grid.width, -1)
    return F.pad(seen, (grid.prefix_tokens, 0, grid.prefix_tokens, 0), value=True)


def neighborhood_mask(height, width, kernel, prefix):
    """Which keys a query sees, by the rule as it is published: a window that slides inward at the border."""
    tokens = [(row, column) for row in range(height) for column in range(width)]
    mask = torch.ones(prefix + len(tokens), prefix + len(tokens), dtype=torch.bool)
    for q, query in enumerate(tokens):
        for k, key in enumerate(tokens):
            starts = [min(max(p - kernel // 2, 0), n - kernel) for p, n in zip(query, (height, width), strict=True)]
            inside = [start <= place < start + kernel for start, place in zip(starts, key, strict=True)]
            mask[prefix + q, prefix + k] = all(inside)
    return mask


def masked_logits(vit, batch, kernel):
    """What a ViT of timm with 16x16 patches and a class token gives when its attention is masked to a kernel."""
    height, width = (side // 16 for side in batch.shape[-2:])
    mask = neighborhood_mask(height, width, kernel, prefix=1)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return vit.forward_head(vit.forward_features(batch, attn_mask=bias))
