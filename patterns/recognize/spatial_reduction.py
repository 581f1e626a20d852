"""Spatial reduction: keys and values come from a smaller map made of the tokens by a strided convolution or pooling."""

from __future__ import annotations

import math

from torch.fx import Node

from ...graph.dataflow import Dataflow
from ...graph.values import argument, operator_name, shape_of
from ...ir.sites import Reduced

_CONVOLVING = ("aten::conv2d", "aten::convolution")
_POOLING = ("aten::avg_pool2d", "aten::adaptive_avg_pool2d", "aten::max_pool2d")


def reduced_keys(key_source: Node, query_source: Node, flow: Dataflow) -> Reduced | None:
    """The reduced map between the queries' tokens and the keys' tokens, or None if there is none."""
    origin = flow.channel_maps.origin(query_source)
    between = flow.ancestors(key_source, stop=lambda node: node is origin)
    shrinking = [node for node in between if operator_name(node) in (*_CONVOLVING, *_POOLING)]
    if not shrinking or origin not in between:
        return None
    last = max(shrinking)
    height, width = shape_of(last)[-2:]
    if height * width != math.prod(shape_of(key_source)[1:-1]):
        return None
    pooled = next((node for node in shrinking if operator_name(node) in _POOLING), None)
    if pooled is not None:
        return Reduced(height, width, operator_name(pooled).removeprefix("aten::"))
    stride = argument(last, 3, default=[1])
    return Reduced(height, width, f"convolution stride {stride[0]}")
