"""Which operations of the captured graph belong to a site, and what they count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ...capture import ModuleCall
from ...graph.dataflow import Dataflow
from ...graph.values import is_call
from ..count.op_costs import contraction_macs


class Regions:
    """Counts the contractions between two values of a graph, each node for one site only."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow
        self._taken: set[Node] = set()
        self._macs: dict[Node, int] = {}

    def claim(self, sources: Iterable[Node], end: Node, more: Iterable[Node] = ()) -> int | None:
        """MACs on all ways from ``sources`` to ``end``, and of ``more``; None if another site has one of them."""
        return self.take(self.counting(sources, end, more))

    def take(self, counting: set[Node]) -> int | None:
        """MACs of these nodes; None if another site has one of them."""
        if counting & self._taken:
            return None
        self._taken |= counting
        return sum(map(self.macs, counting))

    def counting(self, sources: Iterable[Node], end: Node, more: Iterable[Node] = ()) -> set[Node]:
        """What contracts on all ways from ``sources`` to ``end``, and of ``more``."""
        region = self._between(set(sources), end) | set(more)
        return {node for node in region if node not in self._flow.constants and self.macs(node)}

    def inside(self, call: ModuleCall) -> list[Node]:
        """What contracts inside a module's call."""
        position = self._flow.capture.position
        return [node for node in position if call.encloses(position[node]) and self.macs(node)]

    def claim_call(self, call: ModuleCall) -> int:
        """MACs of everything inside a module's call, position networks of parameters alone included."""
        inside = self.inside(call)
        self._taken |= set(inside)
        return sum(map(self.macs, inside))

    def unclaimed(self) -> list[Node]:
        """Every counting node that no site has."""
        nodes = self._flow.capture.graph.nodes
        return [n for n in nodes if n not in self._taken and n not in self._flow.constants and self.macs(n)]

    def macs(self, node: Node) -> int:
        """Contractions of one node, on shapes alone."""
        if node not in self._macs:
            self._macs[node] = _macs_of(node) if is_call(node) else 0
        return self._macs[node]

    def _between(self, sources: set[Node], end: Node) -> set[Node]:
        """Nodes after ``sources`` that ``end`` depends on, ``end`` included."""
        first = min(sources)
        above: set[Node] = set()
        pending = [end]
        while pending:
            node = pending.pop()
            if node in above or node in sources or node < first:
                continue
            above.add(node)
            pending += node.all_input_nodes
        below: set[Node] = set()
        for node in sorted(above):
            if any(used in sources or used in below for used in node.all_input_nodes):
                below.add(node)
        return below


class _Adder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.macs += contraction_macs(func, args, kwargs or {}, result) or 0
        return result


def _macs_of(node: Node) -> int:
    if not any(name in str(node.target) for name in _CONTRACTING):
        return 0
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda used: tree_map(_shape_only, used.meta["val"]))
    with torch.no_grad(), _Adder() as adder:
        node.target(*args, **kwargs)  # type: ignore[operator]  # a call's target is a function
    return adder.macs


_CONTRACTING = ("linear", "mm", "mv", "matmul", "einsum", "conv", "attention", "dot", "addr", "cdist", "attnrewrite")
"""Parts of the names of operators that may hold a contraction; every other node is not run."""


def _shape_only(value: Any) -> Any:
    return (
        torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, Tensor)
        else value
    )
