"""Drop what nothing uses any more in an outlined graph."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx import Node

from .size_course import CHECK


def remove_dead_code(graph: fx.Graph) -> None:
    """Drop what nothing uses any more. Calls of children that nothing uses go too: the new core does their work."""
    count = -1
    while count != len(graph.nodes):  # a write is read by what comes before it, too, until that is dropped
        count = len(graph.nodes)
        for node in reversed(graph.nodes):
            needed = node.op in ("placeholder", "output") or CHECK in node.meta
            if not node.users and not needed and not _writes_to_what_is_read(node):
                graph.erase_node(node)


def _writes_to_what_is_read(node: Node) -> bool:
    """``bias[a:b].zero_()``: nothing uses the result, and what it was written to is used."""
    if not _is_in_place(node):
        return False
    written: Node = node.args[0]  # type: ignore[assignment]  # a node
    while _is_view(written):
        written = written.args[0]  # type: ignore[assignment]  # a node
    pending, seen = [written], {written}
    while pending:
        for user in pending.pop().users:
            if _is_view(user) or _is_in_place(user):
                pending += [user] if user not in seen else []
                seen.add(user)
            else:
                return True
    return False


def _is_in_place(node: Node) -> bool:
    return _schema(node) is not None and _schema(node).is_mutable  # type: ignore[union-attr]  # asked just before


def _is_view(node: Node) -> bool:
    """Whether its result may be a part of its first operand."""
    if node.target is operator.getitem:
        return True
    schema = _schema(node)
    info = None if schema is None or not schema.arguments else schema.arguments[0].alias_info
    return info is not None and not info.is_write


def _schema(node: Node) -> torch.FunctionSchema | None:
    return getattr(node.target, "_schema", None)
