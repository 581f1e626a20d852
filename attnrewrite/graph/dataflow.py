"""What recognizers ask of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..capture import CapturedGraph, NodeRef
from . import movement
from .movement import Provenance
from .restating import restate
from .values import Values, fold_constants, is_call, needed_nodes, operator_name

_LINEAR = {"aten::linear"}
Answer = TypeVar("Answer")


class Dataflow:
    """A capture with its constants folded, and its convolutions of kernel 1 around attention restated.

    ``constants`` are the values no input reaches, ``learned`` those among them that a parameter reaches;
    ``channel_maps`` says which linear maps are convolutions in the model.
    """

    def __init__(self, capture: CapturedGraph) -> None:
        self.capture = capture
        self.channel_maps = restate(capture)
        self.constants: Values = fold_constants(capture)
        self.learned = _reached_by_parameters(capture, self.constants)
        self._remembered: dict[Any, Any] = {}

    @cached_property
    def outputs(self) -> list[Node]:
        """The values that the model returns."""
        return [leaf.node for leaf in tree_leaves(self.capture.root.output) if isinstance(leaf, NodeRef) and leaf.node]

    @cached_property
    def used(self) -> set[Node]:
        """Everything live that the outputs are computed from."""
        return {node for node in needed_nodes(self.outputs, {}) if node not in self.constants}

    def weights(self, node: Node) -> Tensor:
        """The value of a constant: a parameter, or what is computed from parameters alone."""
        return self.constants[node]

    def provenance(
        self, node: Node, stop: Callable[[Node], bool] = lambda node: False, scaling: bool = False
    ) -> Provenance:
        return movement.provenance(node, self.constants, stop, scaling)

    def remembered(self, question: Callable[[Node, Dataflow], Answer], node: Node) -> Answer:
        """``question(node, self)``, asked once: query, key and value often come from one linear map."""
        return self.once((question, node), lambda: question(node, self))

    def once(self, key: Hashable, answer: Callable[[], Answer]) -> Answer:
        """``answer()``, asked once for a ``key`` that says all it hangs on: blocks of a model repeat one another."""
        if key not in self._remembered:
            self._remembered[key] = answer()
        found: Answer = self._remembered[key]
        return found

    def is_movement(self, node: Node) -> bool:
        return movement.is_movement(node, self.constants)

    def is_copy(self, node: Node) -> bool:
        return movement.is_copy(node, self.constants)

    def is_linear(self, node: Node) -> bool:
        """A linear map of the last axis by a constant weight."""
        return operator_name(node) in _LINEAR and node.args[1] in self.constants

    def nodes(self, *names: str) -> list[Node]:
        return [node for node in self.capture.graph.nodes if operator_name(node) in names]

    def provenance_of_constant(self, node: Node) -> Node:
        """The nearest value behind a constant ``node`` that is more than a rearrangement of another."""
        while movement.is_movement(node, {used: self.constants[used] for used in movement.index_operands(node)}):
            node = movement.moved_operands(node)[0]
        return node

    def adds_nothing(self, node: Node) -> bool:
        """``x + 0`` with a constant zero: a mask of nothing, which a model may leave out when it is not traced."""
        if operator_name(node) != "aten::add" or len(node.args) != 2 or node.kwargs:
            return False
        value, mask = node.args
        if (
            not isinstance(value, Node)
            or not isinstance(mask, Node)
            or mask not in self.constants
            or mask in self.learned
            or value in self.constants
        ):
            return False
        added = self.constants[mask]
        return added.is_floating_point() and value.meta["val"].shape == node.meta["val"].shape and not bool(added.any())

    def live_users(self, node: Node) -> list[Node]:
        """Users that compute with the value (an assertion on its metadata does not)."""
        return [user for user in node.users if operator_name(user) != "aten::_assert_tensor_metadata"]

    def ancestors(self, node: Node, stop: Callable[[Node], bool]) -> list[Node]:
        """``node`` and everything live that it depends on, nearest first, not looking behind nodes where ``stop``
        holds."""
        seen = {node: None}
        pending = [node]
        while pending:
            step = pending.pop(0)
            for used in () if stop(step) else step.all_input_nodes:
                if used not in self.constants and used not in seen:
                    seen[used] = None
                    pending.append(used)
        return list(seen)


def _reached_by_parameters(capture: CapturedGraph, constants: Values) -> frozenset[Node]:
    learned: set[Node] = set()
    for node in capture.graph.nodes:
        if node not in constants:
            continue
        if node in capture.learned or (is_call(node) and any(used in learned for used in node.all_input_nodes)):
            learned.add(node)
    return frozenset(learned)
