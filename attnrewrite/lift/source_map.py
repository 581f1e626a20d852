"""Where on the way from a site's source to its projection the tokens lie as a map."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from ..graph.dataflow import Dataflow
from ..graph.values import input_of, operator_name, shape_of
from ..ir.sites import Grid
from .projections import Projected

_VIEWS = {f"aten::{name}" for name in ("view", "reshape", "permute", "transpose", "contiguous", "flatten", "unflatten")}


def map_on_the_way(query: Projected, flow: Dataflow) -> tuple[Node, Grid] | None:
    """The first value from source to projection that holds all tokens as ``[batch, height, width, channels]``.

    A later one, with views alone between, is taken where it shares a smaller module with the projection.
    """
    path = flow.provenance(input_of(query.linear), stop=lambda node: node is query.source).path
    count = math.prod(shape_of(query.source))
    found: Node | None = None
    for node in (query.source, *path):
        shape = shape_of(node)
        if found is not None and (len(shape) > 4 or operator_name(node) not in _VIEWS):
            break
        if len(shape) == 4 and math.prod(shape) == count and shape[-1] == shape_of(query.source)[-1]:
            address = flow.provenance(node, stop=lambda n: n is query.source).address
            if not torch.equal(address.flatten(), torch.arange(count)):
                continue
            if found is None or _span(node, query.linear, flow) < _span(found, query.linear, flow):
                found = node
    if found is None:
        return None
    _, height, width, _ = shape_of(found)
    return found, Grid(height, width)


def _span(node: Node, linear: Node, flow: Dataflow) -> int:
    """Length of the smallest module call that has both."""
    call = flow.capture.enclosing_call([node, linear])
    return call.exit - call.enter
