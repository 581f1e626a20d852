"""Modules that are one linear map in several steps, restated as that map.

A low-rank adapter beside a layer, ``W x + b + s B A x``, or a factorized layer, ``B A x``, is a linear map of the
channels of every token like any other. A graph that says so is read like any other; the module stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..capture import CapturedGraph, ModuleCall, NodeRef
from .values import argument, call_beside, input_of, needed_nodes, operator_name, shape_of

_ATEN = torch.ops.aten
_PASSING = {f"aten::{name}" for name in ("alias", "clone", "contiguous", "to", "_to_copy")}


def restate_linear_modules(capture: CapturedGraph) -> None:
    """Restate, in ``capture``'s graph, every module call that is a linear map of the last axis in several steps.

    What it did inside is not part of the graph, nor of the call, any more.
    """
    pending = [capture.root]
    while pending:
        call = pending.pop()
        if not _restate(call, capture):
            pending += call.children


def _restate(call: ModuleCall, capture: CapturedGraph) -> bool:
    result = call.output.node if isinstance(call.output, NodeRef) else None
    given = [leaf.node for leaf in tree_leaves(call.arguments) if isinstance(leaf, NodeRef)]
    if result is None or len(given) != 1 or given[0] is None or not call.encloses(capture.position.get(result, -1)):
        return False
    reading = _Reading(given[0], result, capture)
    try:
        _, count = reading.maps(result)
    except LookupError:
        return False
    inside = {node for node, position in capture.position.items() if call.encloses(position)}
    if count < 2 or any(user not in inside for node in inside - {result} for user in node.users):
        return False
    affine = reading.composed(result)
    operands = [given[0], affine.matrix, *([] if affine.offset is None else [affine.offset])]
    result.target, result.args, result.kwargs = _ATEN.linear.default, tuple(operands), {}
    capture.position[result] = capture.position.pop(result)  # what is traced at one position stays in order
    for node in reversed(capture.graph.nodes):
        if node in inside and not node.users:
            capture.graph.erase_node(node)
            del capture.position[node]
    call.children = []
    return True


@dataclass(frozen=True)
class _Affine:
    """``matrix @ x + offset`` of every token ``x``; no matrix is the identity, and no offset is zero."""

    matrix: Node | None = None
    offset: Node | None = None


class _Reading:
    """What lies between ``source`` and ``result``, if that is affine in the last axis of ``source``."""

    def __init__(self, source: Node, result: Node, capture: CapturedGraph) -> None:
        self.source, self.result, self.capture = source, result, capture

    def maps(self, node: Node) -> tuple[int, int]:
        """How many linear maps make ``node``, on the shortest way and in all.

        Raises:
            LookupError: it is not affine.
        """
        if node is self.source:
            return 0, 0
        name, operands = operator_name(node), node.all_input_nodes
        if name == "aten::linear" and all(map(self._is_constant, operands[1:])):
            fewest, count = self.maps(operands[0])
            return fewest + 1, count + 1
        if name == "aten::add" and not node.kwargs and len(operands) == 2:
            ways = [self.maps(used) for used in operands if shape_of(used) == shape_of(node)]
            if len(ways) == 2 and all(fewest for fewest, _ in ways):
                return min(fewest for fewest, _ in ways), sum(count for _, count in ways)
        elif self._scales(node) or self._passes(node):
            return self.maps(operands[0])
        raise LookupError(name)

    def composed(self, node: Node) -> _Affine:
        """The same as one map, of constants that are put into the graph before ``result``."""
        if node is self.source:
            return _Affine()
        name, inner = operator_name(node), self.composed(input_of(node))
        if name == "aten::linear":
            weight, offset = input_of(node, 1), argument(node, 2, "bias")
            if inner.matrix is None:
                return _Affine(weight, offset)
            moved = None if inner.offset is None else self._call(_ATEN.mv.default, weight, inner.offset)
            return _Affine(self._call(_ATEN.mm.default, weight, inner.matrix), self._sum(moved, offset))
        if name == "aten::add":
            other = self.composed(input_of(node, 1))
            return _Affine(self._sum(inner.matrix, other.matrix), self._sum(inner.offset, other.offset))
        if self._passes(node):
            return inner
        parts = (inner.matrix, inner.offset)
        return _Affine(*(None if part is None else self._call(node.target, part, node.args[1]) for part in parts))

    def _scales(self, node: Node) -> bool:
        """By one number."""
        if operator_name(node) not in ("aten::mul", "aten::div") or not isinstance(node.args[0], Node) or node.kwargs:
            return False
        factor = node.args[1]
        return not isinstance(factor, Node) or (self._is_constant(factor) and shape_of(factor) == ())

    def _passes(self, node: Node) -> bool:
        """A copy, or a dropout, which does nothing in eval mode and follows the mode of the module that stays."""
        if operator_name(node) == "aten::dropout":
            return True
        return operator_name(node) in _PASSING and node.meta["val"].dtype == input_of(node).meta["val"].dtype

    def _is_constant(self, node: Node) -> bool:
        """No input of the model reaches it."""
        return all(used not in self.capture.inputs for used in needed_nodes([node], {}))

    def _sum(self, one: Node | None, other: Node | None) -> Node | None:
        if one is None or other is None:
            return one or other
        return self._call(_ATEN.add.Tensor, one, other)

    def _call(self, target: Any, *arguments: Any) -> Node:
        with self.capture.graph.inserting_before(self.result):
            return call_beside(self.result, target, arguments, self.capture)
