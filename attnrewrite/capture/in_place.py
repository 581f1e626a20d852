"""In-place operators, stated as those that give a new value where nothing reads the old one afterwards.

``scores += bias`` or an in-place dropout then reads as any other sum or dropout, whoever looks at the graph.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..errors import UNFORESEEN

IN_PLACE = "attnrewrite_in_place"
"""In the ``meta`` of a restated node: the operator that the model uses, and the value whose memory it writes."""

_PASSING_IN_EVAL = {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"}
"""Give their operand itself, which their schema does not say."""


def restate_in_place(graph: Graph) -> None:
    """Exchange the targets of in-place operators in ``graph`` where that changes no value."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    memory = _memory(graph)
    sharing: dict[Node, list[Node]] = defaultdict(list)
    for node, base in memory.items():
        sharing[base].append(node)
    for node in graph.nodes:
        target = _giving_a_new_value(node)
        if target is None or memory[node].op == "placeholder":
            continue
        others = (other for other in sharing[memory[node]] if not _is_made_of(other, node, memory))
        read = (other for other in others if any(order[user] > order[node] for user in other.users))
        if all(_are_apart(other, node) for other in read):
            node.meta[IN_PLACE] = (node.target, memory[node])
            node.target = target


def _memory(graph: Graph) -> dict[Node, Node]:
    """Whose memory every value lies in: its own, or that of the value it is a view of."""
    memory: dict[Node, Node] = {}
    for node in graph.nodes:
        shared = _shared_operand(node)
        memory[node] = node if shared is None else memory[shared]
    return memory


def _shared_operand(node: Node) -> Node | None:
    if node.target is operator.getitem:
        return node.args[0]  # type: ignore[return-value]  # a node
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.args or not isinstance(node.args[0], Node):
        return None
    aliasing = any(result.alias_info is not None for result in schema.returns)
    return node.args[0] if aliasing or schema.name in _PASSING_IN_EVAL else None


def _giving_a_new_value(node: Node) -> Any | None:
    """The operator that gives what an in-place one writes, of the same dtype; None if ``node`` is no such operator."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("aten::") or not schema.name.endswith("_"):
        return None
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::")[:-1], None)
    target = getattr(packet, schema.overload_name or "default", None)
    if target is None or writes[0] is not True or any(writes[1:]):
        return None
    try:
        given, made = torch.fx.node.map_arg((node.args, node.kwargs), _without_values), node.meta["val"]
        result = target(*given[0], **given[1])
        return target if (result.shape, result.dtype) == (made.shape, made.dtype) else None
    except UNFORESEEN:  # not every operator runs on shapes alone
        return None


def _without_values(node: Node) -> Tensor:
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _is_made_of(other: Node, node: Node, memory: dict[Node, Node]) -> bool:
    """Whether ``other`` is ``node``, or a view of what it gives."""
    while other is not node:
        shared = _shared_operand(other)
        if shared is None or memory[shared] is not memory[node]:
            return False
        other = shared
    return True


def _are_apart(one: Node, other: Node) -> bool:
    """Whether two values that share memory have no element in common, as queries and keys of one packed value."""
    first, second = (_places(node.meta["val"]) for node in (one, other))
    if first is None or second is None:
        return False
    return not bool(torch.isin(first, second, assume_unique=True).any())


def _places(value: Any) -> Tensor | None:
    """Where in memory the elements of ``value`` lie."""
    if not isinstance(value, Tensor):
        return None
    place = torch.tensor([value.storage_offset()])
    for size, stride in zip(value.shape, value.stride(), strict=True):
        place = (place[:, None] + torch.arange(size) * stride).flatten()
    return place.unique()
