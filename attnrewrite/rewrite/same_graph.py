"""Are two outlined graphs the same but for numbers?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .outline import Outlined


def difference(first: Outlined, other: Outlined) -> str:
    """Why two outlined graphs are not the same but for numbers; an empty string if they are."""
    before, after = list(first.graph.nodes), list(other.graph.nodes)
    if len(before) != len(after):
        return "its operators"
    place = {node: number for number, node in enumerate(after)}
    twin = dict(zip(before, after, strict=True))
    for one, two in twin.items():
        if one.op != two.op or (one.op != "placeholder" and one.target != two.target):
            return name_of(one)
        leaves, others = list(leaves_of(one)), list(leaves_of(two))
        if len(leaves) != len(others):
            return name_of(one)
        for leaf, counterpart in zip(leaves, others, strict=True):
            if isinstance(leaf, Node):
                if not isinstance(counterpart, Node) or place[counterpart] != place[twin[leaf]]:
                    return name_of(one)
            elif type(leaf) is not type(counterpart) or (not is_number(leaf) and leaf != counterpart):
                return name_of(one)
        if one.op == "get_attr" and not _same_constant(first, other, str(one.target)):
            return "a constant"
    return ""


def _same_constant(first: Outlined, other: Outlined, name: str) -> bool:
    one, two = first.constants.get(name), other.constants.get(name)
    if one is None or two is None:
        return one is two
    return one is two or (one.shape == two.shape and one.dtype == two.dtype and bool(torch.equal(one, two)))


def leaves_of(node: Node) -> Iterator[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    fx.node.map_aggregate((node.args, node.kwargs), note)
    return iter(found)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def name_of(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
