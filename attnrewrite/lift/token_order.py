"""Whether tokens keep their order from the projection to an operand, through what acts on them on the way."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..graph.contraction import canonical
from ..graph.dataflow import Dataflow
from ..graph.values import input_of, operator_name, shape_of
from ..ir.axes import position_and_dim
from ..ir.sites import Operand
from .projections import source_tokens

_IN_PLACE = {f"aten::{name}" for name in ("batch_norm", "layer_norm", "rms_norm", "group_norm", "conv1d", "conv2d")}
"""Operators that give every place of their operand's layout to the same place of a result of its shape."""


def is_reordered(operand: Operand, flow: Dataflow) -> bool:
    """Whether it is known that ``operand`` has its tokens in another order than the linear map that they come from."""
    node, address = operand.node, torch.arange(operand.node.meta["val"].numel()).view(shape_of(operand.node))
    while True:
        found = flow.provenance(node, stop=flow.is_linear, scaling=True)
        source = found.source
        if source is None:
            return False
        address = found.address.flatten()[address]
        if flow.is_linear(source):
            break
        onward = _in_place(source, flow)
        if onward is None:
            return False
        node = onward
    _, slots = flow.remembered(source_tokens, input_of(source))
    position, dim = position_and_dim(operand.axes)
    groups = "".join(axis for axis in operand.axes if axis not in position + dim)
    token = canonical(slots[address // shape_of(source)[-1]], operand.axes, groups + position + dim)
    steps = token[..., 0].diff(dim=-1)
    mixed = bool((token != token[..., :1]).any())
    return mixed or bool((steps != steps[..., :1]).any()) or bool((steps < 1).any())


def _in_place(node: Node, flow: Dataflow) -> Node | None:
    """The one operand whose places are those of the result."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    live = [used for used in node.all_input_nodes if used not in flow.constants]
    if len(live) != 1 or not (pointwise or operator_name(node) in _IN_PLACE):
        return None
    return live[0] if shape_of(live[0]) == shape_of(node) else None
