"""A captured graph: what is read, proved and edited, wherever it came from. It knows no ``nn.Module``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from .autocast_regions import Interval
from .module_call import ModuleCall
from .sizes import SizeRecord


@dataclass(frozen=True, eq=False)
class CapturedGraph:
    """An ATen graph of one call at one input size.

    ``tensors`` holds the value of every placeholder: parameters, buffers, constants and the example inputs, which
    ``inputs`` lists. ``names`` gives the qualified name of those that the model holds, and ``learned`` are its
    parameters. ``position`` orders the nodes as they were traced, the order in which ``root``, the tree of module
    calls, is stated. ``uncast`` are the positions at which autocast is turned off. ``sizes`` is what was computed from
    the shapes of values. ``training_dropout`` tells, for a call and a scale of dot products that is no rate, the
    largest rate on attention weights that eval mode does not show.
    """

    graph: Graph
    inputs: list[Node]
    tensors: dict[Node, Any]
    names: dict[Node, str]
    learned: frozenset[Node]
    position: dict[Node, int]
    root: ModuleCall
    uncast: list[Interval]
    sizes: SizeRecord
    training_dropout: Callable[[ModuleCall, float], float]

    @property
    def batch(self) -> int:
        """Samples in the example input."""
        return int(self.tensors[self.inputs[0]].shape[0])

    def is_uncast(self, node: Node) -> bool:
        """Whether ``node`` is computed with autocast turned off, whatever its surroundings have."""
        position = self.position.get(node)
        return position is not None and any(start <= position < stop for start, stop in self.uncast)

    def enclosing_call(self, nodes: list[Node]) -> ModuleCall:
        """The smallest module call that holds all of ``nodes``."""
        traced = [self.position[node] for node in nodes if node in self.position]
        call = self.root
        while True:
            inner = next((c for c in call.children if all(c.encloses(p) for p in traced)), None)
            if inner is None:
                return call
            call = inner
