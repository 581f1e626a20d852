"""What each site means, computed from the site's data alone: weights by row, tokens by index, no captured code.

These forms are the reference that a recognition is certified against; clarity counts, speed does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..ir import AttentionSite, HeadNorm, MapGroups, MlpSite, Operand, Projection, Stage, StemSite, Window
from ..layout import heads_last
from ..lift.activations import ACTIVATIONS
from ..lift.values import argument

Weights = Callable[[Node], Tensor]


def attention(site: AttentionSite, source: Tensor, key_source: Tensor, weights: Weights) -> Tensor:
    """The whole site, from the value that feeds the projections to after the output projection.

    Returns ``[batch, tokens, channels]``; without an output projection the heads-last core output.
    """
    assert site.query is not None
    assert site.key is not None
    assert site.value is not None
    x, y = tokens(source, site.nodes.batch_axis), tokens(key_source, site.nodes.batch_axis)
    x = x if site.queries is None else x[:, site.queries]
    query = normalised(project(x, site.query, weights), site.query_norm, weights)
    key = normalised(project(y, site.key, weights), site.key_norm, weights)
    value = project(y, site.value, weights)
    phantom = (normalised(_at_zero(site.key, weights), site.key_norm, weights), _at_zero(site.value, weights))
    mixed = attend(site, query, key, value, weights, phantom)
    if site.output is None:
        return mixed
    merged = torch.zeros(*mixed.shape[:2], site.output.rows.numel(), dtype=mixed.dtype)
    merged[..., site.output.rows.flatten()] = mixed.flatten(2)
    bias = None if site.output.bias is None else weights(site.output.bias)
    return F.linear(merged, weights(site.output.weight), bias)


def attend(
    site: AttentionSite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    phantom: tuple[Tensor, ...] = (),
) -> Tensor:
    """Softmax attention of heads-last ``[batch, tokens, heads, dim]`` tensors over the site's keys."""
    scale: Tensor | float = site.scale
    for node in site.learned_scales:
        scale = scale * per_head(weights(node), site.heads)
    added = [] if site.bias is None else [site.bias.values]
    if site.mask is not None:
        added.append(site.mask)
    if isinstance(site.keys, MapGroups):
        return _attend_in_groups(site, site.keys, query, key, value, phantom, scale)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    for term in added:
        scores = scores + term.to(scores.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)


def mlp(site: MlpSite, source: Tensor, weights: Weights) -> Tensor:
    """``[..., channels]`` before the first linear map to ``[..., channels]`` after the second."""
    value = _channels(source, site.first, site.rows, weights)
    for stage in site.stages:
        if stage.kind == "activation":
            value = ACTIVATIONS[stage.name](value)
        elif stage.kind == "gate":
            assert stage.gate is not None
            assert stage.rows is not None
            value = ACTIVATIONS[stage.name](value) * _channels(source, stage.gate, stage.rows, weights)
        elif stage.kind == "convolution":
            convolved = _depthwise(value, stage, weights)
            value = convolved if stage.added is None else value + convolved
        else:
            value = _layer_norm(value, stage.node, weights)
    return _linear(value, site.second, weights)


def stem(site: StemSite, source: Tensor, weights: Weights) -> Tensor:
    """A strided convolution of a map, or a linear map of gathered patches, normalised first if the site says so."""
    if site.patches is None:
        bias = None if site.bias is None else weights(site.bias)
        return F.conv2d(source, weights(site.weight), bias, site.stride, site.padding)
    tokens_ = torch.cat([source.flatten(0, -2), source.new_zeros(1, source.shape[-1])])
    gathered = tokens_[site.patches].flatten(-2)
    if site.norm_node is not None:
        gathered = _layer_norm(gathered, site.norm_node, weights)
    bias = None if site.bias is None else weights(site.bias)
    return F.linear(gathered, weights(site.weight), bias)


def project(x: Tensor, projection: Projection, weights: Weights) -> Tensor:
    """``[batch, tokens, channels]`` to heads-last ``[batch, tokens, heads, head_dim]`` by weight rows."""
    rows = projection.rows.flatten()
    bias = None if projection.bias is None else weights(projection.bias)[rows]
    return F.linear(x, weights(projection.weight)[rows], bias).unflatten(-1, projection.rows.shape)


def normalised(value: Tensor, norm: HeadNorm | None, weights: Weights) -> Tensor:
    """Head vectors ``[..., head_dim]`` over their length; of a layer norm, what is off their mean over its own."""
    if norm is None:
        return value
    value = value - value.mean(-1, keepdim=True) if norm.kind == "layer" else value
    squares = value.square().sum(-1, keepdim=True)
    squares = squares if norm.kind == "l2" else squares / value.shape[-1]
    if norm.place == "root":
        length = (squares + norm.eps).sqrt()
    else:
        length = squares.sqrt().clamp(min=norm.eps) if norm.place == "clamp" else squares.sqrt() + norm.eps
    made = value / length
    made = made if norm.weight is None else made * weights(norm.weight).flatten()
    return made if norm.bias is None else made + weights(norm.bias).flatten()


def tokens(value: Tensor, batch_axis: int) -> Tensor:
    """``[batch, tokens, channels]`` of a channels-last value."""
    return value.movedim(batch_axis, 0).flatten(1, -2)


def operand_heads_last(value: Tensor, operand: Operand, site: AttentionSite) -> Tensor:
    """A captured operand as ``[batch, tokens, heads, dim]``."""
    return heads_last(value, operand.axes, site.nodes.batch_groups, site.nodes.head_groups, site.head_sizes)


def per_head(scale: Tensor, heads: int) -> Tensor:
    """A learned scale that broadcasts over ``[batch, heads, queries, keys]``."""
    return scale.reshape(heads, 1, 1) if scale.numel() == heads else scale.reshape(())


def _attend_in_groups(
    site: AttentionSite,
    groups: MapGroups,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phantom: tuple[Tensor, ...],
    scale: Tensor | float,
) -> Tensor:
    assert site.grid is not None
    slots = groups.slots(site.grid) if site.place is None else _slots_of_tokens(groups.slots(site.grid), site.place)
    token = slots.clamp(min=0)
    query, key, value = (part[:, token] for part in (query, key, value))
    for part, filler in zip((key, value), phantom, strict=True):
        part[:, slots == Window.PHANTOM] = filler
    scores = torch.einsum("bgnhd,bgmhd->bghnm", query, key) * scale
    if site.bias is not None:
        scores = scores + site.bias.values.to(scores.dtype)
    scores = scores.masked_fill((slots == Window.ABSENT)[:, None, None, :], -math.inf)
    mixed = torch.einsum("bghnm,bgmhd->bgnhd", scores.softmax(-1), value)
    result = torch.empty(mixed.shape[0], site.grid.tokens, *mixed.shape[3:], dtype=mixed.dtype)
    result[:, slots[slots >= 0]] = mixed[:, slots >= 0]
    return result


def _slots_of_tokens(slots: Tensor, place: Tensor) -> Tensor:
    """The token in every slot, from the cell there."""
    return torch.where(slots < 0, slots, torch.argsort(place)[slots.clamp(min=0)])


def _channels(source: Tensor, linear: Node, rows: Tensor, weights: Weights) -> Tensor:
    bias = argument(linear, 2)
    return F.linear(source, weights(argument(linear, 1))[rows], None if bias is None else weights(bias)[rows])


def _linear(value: Tensor, linear: Node, weights: Weights) -> Tensor:
    bias = argument(linear, 2)
    return F.linear(value, weights(argument(linear, 1)), None if bias is None else weights(bias))


def _depthwise(value: Tensor, stage: Stage, weights: Weights) -> Tensor:
    """Tokens to the map the convolution ran on, through it, and back."""
    weight, bias = argument(stage.call, 1), argument(stage.call, 2)
    stride, padding = argument(stage.call, 3, "stride", 1), argument(stage.call, 4, "padding", 0)
    height, width = stage.grid
    channels = value.shape[-1]
    image = value.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    bias = None if bias is None else weights(bias)
    image = F.conv2d(image, weights(weight), bias, stride, padding, groups=channels)
    return image.permute(0, 2, 3, 1).reshape(value.shape)


def _layer_norm(value: Tensor, norm: Node, weights: Weights) -> Tensor:
    shape, weight, bias = (argument(norm, position) for position in range(1, 4))
    scale, shift = (None if part is None else weights(part) for part in (weight, bias))
    return F.layer_norm(value, shape, scale, shift, argument(norm, 4, "eps", 1e-5))


def _at_zero(projection: Projection, weights: Weights) -> Tensor:
    """What a padded slot projects to, ``[heads, head_dim]``."""
    rows = projection.rows
    if projection.bias is None:
        return torch.zeros(rows.shape, dtype=weights(projection.weight).dtype)
    return weights(projection.bias)[rows]
