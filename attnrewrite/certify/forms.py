"""What each site means, computed from the site's data alone: weights by row, tokens by index, no captured code.

An attention is three forms: projections, normalized or not, the attention of given operands, and the last projection.

These forms are the reference that a recognition is certified against; clarity counts, speed does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..graph.values import argument
from ..ir.heads import heads_last
from ..ir.sites import AttentionSite, HeadNorm, MlpSite, Operand, Projection, Stage, StemSite
from ..numerics.activations import ACTIVATIONS

Weights = Callable[[Node], Tensor]


@dataclass(frozen=True)
class ScoresOf:
    """Which scores are looked at: the ``heads`` ``[groups]`` that groups belong to, the query ``rows`` of each group
    (None: all), and the keys ``hidden`` ``[groups, queries, keys]`` from a query (None: nothing is)."""

    heads: Tensor
    rows: Tensor | None = None
    hidden: Tensor | None = None

    def every_group(self, term: Tensor) -> Tensor:
        """What is added to the scores, ``[heads or 1, queries, keys]``, for the groups and rows."""
        term = term if self.rows is None else term[:, self.rows]
        return term if len(term) == 1 else term[self.heads]


def attend(
    site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, weights: Weights, scores_of: ScoresOf
) -> Tensor:
    """Softmax attention inside groups: ``[groups, queries, dim]`` to ``[groups, queries, value dim]``."""
    scale: Tensor | float = site.scale_of_operands
    for node in site.learned_scales:
        learned = weights(node).flatten()
        scale = scale * (learned if learned.numel() == 1 else learned[scores_of.heads, None, None])
    scores = torch.einsum("gnd,gmd->gnm", query, key) * scale
    for term in (None if site.bias is None else site.bias.values, site.mask):
        if term is not None:
            scores = scores + scores_of.every_group(term).to(scores)
    if scores_of.hidden is not None:
        scores = scores.masked_fill(scores_of.hidden.to(scores.device), -math.inf)
    return torch.einsum("gnm,gme->gne", scores.softmax(-1), value)


def merge(site: AttentionSite, mixed: Tensor, weights: Weights) -> Tensor:
    """The output projection of ``[tokens, heads, dim]``."""
    assert site.output is not None
    rows = torch.zeros(len(mixed), site.output.rows.numel(), dtype=mixed.dtype, device=mixed.device)
    rows[:, site.output.rows.flatten()] = mixed.flatten(1)
    bias = None if site.output.bias is None else weights(site.output.bias)
    return F.linear(rows, weights(site.output.weight), bias)


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
    """A strided convolution of a map, or a linear map of gathered patches, normalized first if the site says so."""
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
    """``[..., channels]`` to heads-last ``[..., heads, head_dim]`` by weight rows."""
    rows = projection.rows.flatten()
    bias = None if projection.bias is None else weights(projection.bias)[rows]
    return F.linear(x, weights(projection.weight)[rows], bias).unflatten(-1, projection.rows.shape)


def normalized(value: Tensor, norm: HeadNorm | None, weights: Weights) -> Tensor:
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


def operand_heads_last(value: Tensor, operand: Operand, site: AttentionSite) -> Tensor:
    """A captured operand as ``[batch, tokens, heads, dim]``."""
    return heads_last(value, operand.axes, site.nodes.batch_groups, site.nodes.head_groups, site.head_sizes)


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
