"""Convolutions of kernel 1 around attention, restated as what they are: linear maps of the channels of every token.

On a map ``[batch, channels, height, width]`` (or ``[batch, channels, tokens]``) such a convolution puts the channels
last, applies a linear map by the weight ``[out, in]``, and puts them first again. A graph that says so is read like any
other; the modules of the model stay convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..capture import CapturedGraph
from .values import argument, call_beside, input_of, is_call, operator_name, shape_of

_CONVOLUTIONS = {"aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"}
_POINTWISE = {"aten::conv1d", "aten::conv2d"}
_ATTENTION = {f"aten::{name}" for name in ("softmax", "_softmax", "_safe_softmax", "scaled_dot_product_attention")}


@dataclass
class ChannelMaps:
    """What was restated.

    ``linear[convolution]`` is the linear map that the node of a convolution now puts into its layout; ``moved[value]``
    is the map ``value`` with its channels last, on which every linear map of it acts.
    """

    linear: dict[Node, Node] = field(default_factory=dict)
    moved: dict[Node, Node] = field(default_factory=dict)

    def hold(self, node: Node) -> bool:
        """Whether ``node`` is the linear map of a convolution."""
        return node in self.linear.values()

    def origin(self, node: Node) -> Node:
        """The map that ``node`` is with its channels last, as the model has it; any other value is its own."""
        return next((value for value, moved in self.moved.items() if moved is node), node)


def restate_convolutions(capture: CapturedGraph) -> ChannelMaps:
    """Restate, in ``capture``'s graph, the convolutions of kernel 1 nearest to attention, before it and behind it.

    The node of a convolution stays: it becomes the last step, the one that puts the channels first.
    """
    anchors = [node for node in capture.graph.nodes if _is_attention(node)]
    behind = _walk(anchors, lambda node: node.users)
    before = _walk([*anchors, *behind], lambda node: node.all_input_nodes)
    found = ChannelMaps()
    for node in sorted(before | behind):
        if is_pointwise_convolution(node):
            _restate(node, found, capture)
    return found


def is_pointwise_convolution(node: Node) -> bool:
    """A convolution that mixes nothing but the channels of one place: kernel 1, stride 1, no padding, no groups."""
    if operator_name(node) not in _POINTWISE:
        return False
    _, channels, *kernel = shape_of(input_of(node, 1))
    given = shape_of(input_of(node))
    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    plain = set(kernel) == {1} == _numbers(stride) and (isinstance(padding, str) or _numbers(padding) == {0})
    return plain and len(given) == len(kernel) + 2 and given[1] == channels


def _is_attention(node: Node) -> bool:
    return operator_name(node) in _ATTENTION or operator_name(node).startswith("attnrewrite::")


def _walk(starts: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """What is reached from ``starts``, not looking behind linear maps, convolutions and further attention."""
    seen: set[Node] = set()
    pending = [node for start in starts if not _ends(start) or _is_attention(start) for node in following(start)]
    while pending:
        node = pending.pop()
        if node not in seen and is_call(node):
            seen.add(node)
            pending += [] if _ends(node) else following(node)
    return seen


def _ends(node: Node) -> bool:
    return operator_name(node) in _CONVOLUTIONS or operator_name(node) == "aten::linear" or _is_attention(node)


def _restate(node: Node, found: ChannelMaps, capture: CapturedGraph) -> None:
    value, weight = input_of(node), input_of(node, 1)
    bias = argument(node, 2, "bias")
    rank = len(shape_of(node))
    with capture.graph.inserting_before(node):
        if value not in found.moved:
            arguments = (value, _channels_last(rank))
            found.moved[value] = call_beside(node, torch.ops.aten.permute.default, arguments, capture)
        matrix = call_beside(node, torch.ops.aten.flatten.using_ints, (weight, 1), capture)
        operands = (found.moved[value], matrix) if bias is None else (found.moved[value], matrix, bias)
        found.linear[node] = call_beside(node, torch.ops.aten.linear.default, operands, capture)
    node.target, node.kwargs = torch.ops.aten.permute.default, {}
    node.args = (found.linear[node], [0, rank - 1, *range(1, rank - 1)])
    capture.position[node] = capture.position.pop(node)  # what is traced at one position stays in order


def _channels_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]


def _numbers(value: Any) -> set[int]:
    return {value} if isinstance(value, int) else set(value)
