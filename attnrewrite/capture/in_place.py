"""In-place operators, stated as those that give a new value where nothing reads the old one afterwards.

``scores += bias`` or an in-place dropout then reads as any other sum or dropout, whoever looks at the graph.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..errors import UNFORESEEN

IN_PLACE = "attnrewrite_in_place"
"""In the ``meta`` of a restated node: the operator that the model uses, and the value whose memory it writes."""


def restate_in_place(graph: Graph) -> None:
    """Exchange the targets of in-place operators in ``graph`` where that changes no value."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    sharing: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        target, memory = _giving_a_new_value(node), sharing[_memory(node)]
        if target is not None and memory and memory[0].op != "placeholder":
            read = (other for other in memory if any(order[user] > order[node] for user in other.users))
            if all(_are_apart(other, node) for other in read):
                node.meta[IN_PLACE] = (node.target, memory[0])
                node.target = target
        memory.append(node)


def _memory(node: Node) -> int:
    """The memory that a value lies in, as the trace had it: schemas do not name all views (``einsum``, ``type_as``)."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else -1


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


def _are_apart(one: Node, other: Node) -> bool:
    """Whether two values that share memory have no element in common, as queries and keys of one packed value."""
    first, second = (_places(node.meta["val"]) for node in (one, other))
    return not bool(torch.isin(first, second, assume_unique=True).any())


def _places(value: Tensor) -> Tensor:
    """Where in memory the elements of ``value`` lie."""
    place = torch.tensor([value.storage_offset()])
    for size, stride in zip(value.shape, value.stride(), strict=True):
        place = (place[:, None] + torch.arange(size) * stride).flatten()
    return place.unique()
