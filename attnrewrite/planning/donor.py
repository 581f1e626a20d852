"""The live half of a plan: the model that is to be converted, and what was seen of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from ..capture import Capture, NodeRef
from ..capture.replica import independent, replica
from ..graph.dataflow import Dataflow
from ..graph.values import Values
from ..lift.looks import Looks
from ..numerics.draws import same_draws
from ..numerics.error import relative_error
from ..rewrite.attention_weights import Unavailable

Versions = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Donor:
    """A model as it was captured, with its ``flow``, and with ``looks``, what it is at other sizes; ``versions`` are
    those of its weights when it was captured."""

    capture: Capture
    flow: Dataflow
    versions: Versions
    looks: Looks | None = None

    @classmethod
    def of(cls, capture: Capture) -> Donor:
        return cls(capture, Dataflow(capture), _versions(capture.model))

    @property
    def model(self) -> nn.Module:
        return self.capture.model

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def output_nodes(self) -> list[Node]:
        return nodes_of(self.capture.root.output)

    def expected(self, values: Values) -> list[Any]:
        """The model's own outputs on the example input: those in ``values``, unless its weights are others now."""
        if _versions(self.model) != self.versions:
            return outputs_of(self.model, *self.capture.example)
        return [values[node] for node in self.output_nodes]

    def rounding(self, expected: list[Any]) -> float:
        """How far the model's own outputs are from those that it gives in float64: an ill-conditioned one rounds much.
        Nothing is known of one that does not run in it."""
        args, kwargs = tree_map(_doubled, self.capture.example)
        try:
            exact = outputs_of(independent(self.model).double(), args, kwargs)
        except Exception:  # a dtype of its own in its code
            return 0.0
        pairs = zip(expected, exact, strict=True)
        return max((relative_error(e.double(), a) for e, a in pairs if isinstance(e, Tensor)), default=0.0)


def outputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a replica of ``model`` returns in eval mode: tensors, and attention weights that it withholds."""
    with torch.no_grad(), same_draws(model.parameters()):
        output = replica(model, training=False, own_buffers=True)(*args, **kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor | Unavailable)]


def nodes_of(tree: Any) -> list[Node]:
    """The nodes that a call's arguments or result refer to, in order."""
    return [leaf.node for leaf in tree_leaves(tree) if isinstance(leaf, NodeRef) and leaf.node is not None]


def _versions(model: nn.Module) -> Versions:
    """Changes when a parameter or buffer is exchanged or written to."""
    return tuple((id(value), value._version) for value in (*model.parameters(), *model.buffers()))


def _doubled(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
