"""Softmax, as an operator or spelt out."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ..graph.values import argument, input_of, operator_name, shape_of

_OPERATORS = ("aten::softmax", "aten::_softmax", "aten::_safe_softmax")


@dataclass(frozen=True)
class Softmax:
    """``weights`` is the softmax of ``scores`` along ``axis``; ``nodes`` are all that compute it."""

    scores: Node
    weights: Node
    axis: int
    nodes: tuple[Node, ...]


def softmax_at(node: Node) -> Softmax | None:
    """Read ``node`` as the result of a softmax: one operator, or ``exp(x) / exp(x).sum(axis, keepdim=True)``."""
    if operator_name(node) in _OPERATORS:
        return Softmax(input_of(node), node, _axis(node, argument(node, 1, "dim", -1)), (node,))
    if operator_name(node) not in ("aten::div", "aten::div_") or len(node.all_input_nodes) != 2 or node.kwargs:
        return None
    powers, total = node.all_input_nodes
    if operator_name(powers) != "aten::exp" or operator_name(total) != "aten::sum" or node.args[0] is not powers:
        return None
    summed, axes = input_of(total), argument(total, 1, "dim")
    kept = argument(total, 2, "keepdim", False)
    if operator_name(summed) != "aten::exp" or not isinstance(axes, list) or len(axes) != 1 or not kept:
        return None
    scores = input_of(powers)
    if input_of(summed) is not scores:
        return None
    return Softmax(scores, node, _axis(node, axes[0]), tuple(dict.fromkeys((powers, summed, total, node))))


def _axis(node: Node, axis: int) -> int:
    return int(axis) % len(shape_of(node))
