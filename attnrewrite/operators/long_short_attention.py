"""Attention inside unshifted groups of a map: of neighbors (short distance) or of tokens an interval apart (long).

CrossFormer (Wang et al. 2022, section 3.2); MaxViT's grid attention (Tu et al. 2022) is the long one on a map of one
region. With an interval of 1 the groups are windows, and this is the same function as the operator
``attnrewrite::grouped_attention`` without a shift. Which group a token belongs to says ``partition_rule``.

The function here is the meaning: plain torch operations, for any device, layout and floating dtype, of any order of
differentiation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .partition_rule import Grouping, from_groups, into_groups, visible_keys


@dataclass(frozen=True)
class LongShortGeometry:
    """What of a call is no tensor.

    Attributes:
        grouping: the groups, of the map with its padding.
        hides_padding: whether padded slots are left out of the softmax (CrossFormer); otherwise they are keys with
            whatever the operands hold there (Swin).
        scale: of the dot products; None is ``head_dim ** -0.5``.
        dropout: rate on the attention weights.
    """

    grouping: Grouping
    hides_padding: bool = True
    scale: float | None = None
    dropout: float = 0.0

    def macs(self, heads: int, head_dim: int, value_dim: int, extra_keys: int = 0) -> int:
        """Multiply-accumulates of one image, those of padding included.

        Arguments and sizes may be symbols of whole numbers, where a cost is wanted as a formula.
        """
        pairs = self.grouping.groups * self.grouping.slots * (self.grouping.slots + extra_keys)
        return heads * pairs * (head_dim + value_dim)


def long_short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: LongShortGeometry,
    bias: Tensor | None = None,
    extra_keys: Tensor | None = None,
    extra_values: Tensor | None = None,
) -> Tensor:
    """Attend.

    Args:
        query, key, value: ``[B, H, W, heads, head_dim]`` (values may have channels of their own), padded to whole
            regions by ``padded_map``.
        geometry: groups and form.
        bias: ``[heads, slots, slots]``, added to the scores by the places of query and key in their group.
        extra_keys, extra_values: ``[B, extra, heads, ...]``, seen by every query, without bias.

    Returns:
        ``[B, H, W, heads, value_dim]``, the results of padding among them: see ``cropped_map``.

    Raises:
        ArgumentError: for operands that are not of the geometry's map, or extra keys without values.
    """
    grouping = geometry.grouping
    _check(query, key, value, grouping, extra_keys, extra_values)
    batch = query.shape[0]
    query, key, value = (into_groups(part, grouping) for part in (query, key, value))
    if extra_keys is not None and extra_values is not None:
        key, value = (
            torch.cat([extra[:, None].expand(-1, grouping.groups, -1, -1, -1), part], dim=2)
            for extra, part in ((extra_keys, key), (extra_values, value))
        )
    query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
    added = _added(query, geometry, bias)
    if added is not None and extra_keys is not None:
        added = F.pad(added, (extra_keys.shape[1], 0))
    mixed = F.scaled_dot_product_attention(query, key, value, added, geometry.dropout, scale=geometry.scale)
    return from_groups(mixed.transpose(1, 2).unflatten(0, (batch, -1)), grouping)


def _added(query: Tensor, geometry: LongShortGeometry, bias: Tensor | None) -> Tensor | None:
    """``[B * groups or 1, heads or 1, slots, slots]``: the bias, and minus infinity at padded keys."""
    bias = None if bias is None else bias[None].to(query.dtype)
    grouping = geometry.grouping
    if not (grouping.pads and geometry.hides_padding):
        return bias
    visible = visible_keys(grouping, *grouping.sides, query.device)
    # Groups of nothing but padding are thrown away, but a softmax over no key would make their gradients NaN.
    visible = visible | ~visible.any(-1, keepdim=True)
    groups = visible.shape[0]
    bias = query.new_zeros(1, 1, 1, 1) if bias is None else bias
    masked = torch.where(visible[:, None, None], bias, -math.inf)
    return masked.expand(query.shape[0] // groups, -1, -1, -1, -1).flatten(0, 1)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grouping: Grouping,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
) -> None:
    sides = grouping.padded_sides
    if query.ndim != 5 or any(tuple(part.shape[1:3]) != sides for part in (query, key, value)):
        shapes = ", ".join(str(list(part.shape)) for part in (query, key, value))
        raise ArgumentError(
            f"query, key, value: must all be [B, {sides[0]}, {sides[1]}, heads, head_dim], padded to whole regions, "
            f"got {shapes}"
        )
    if (extra_keys is None) != (extra_values is None):
        raise ArgumentError("extra_keys, extra_values: give both or neither")
