"""What is added to logits before the softmax, as an index into one small table.

Column ``FREE`` of the table adds nothing, column ``ABSENT`` removes a key, the rest are the entries of the bias. So a
mask and a bias are one gather, and the gradient of the bias is one scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

FREE, ABSENT, FIRST_BIAS = 0, 1, 2


def logit_table(bias: Tensor | None, like: Tensor) -> Tensor:
    """The table, ``[heads, 2 + entries]`` (``[1, 2]`` without bias), of the dtype and on the device of ``like``."""
    fixed = like.new_tensor([[0.0, -torch.inf]])
    if bias is None:
        return fixed
    return torch.cat([fixed.expand(len(bias), -1), bias.flatten(1).to(like.dtype)], dim=1)


def bias_gradient(grad_table: Tensor, bias: Tensor | None) -> Tensor:
    """The part of a table's gradient that belongs to the bias, in its shape; empty without bias."""
    if bias is None:
        return grad_table.new_empty(0)
    return grad_table[:, FIRST_BIAS:].reshape(bias.shape)


def over_axes(parts: Sequence[Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Join one ``[queries, keys]`` table an axis to one for the map, row-major in both directions."""

    def product(outer: Tensor, inner: Tensor) -> Tensor:
        return join(outer[:, None, :, None], inner[None, :, None, :]).flatten(2).flatten(0, 1)

    return reduce(product, parts)


def row_major(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Flat indices into a map of ``sizes`` from one table of indices an axis."""
    weighted, stride = [], 1
    for part, size in zip(reversed(parts), reversed(sizes), strict=True):
        weighted.append(part * stride)
        stride *= size
    return over_axes(weighted[::-1], torch.add)
