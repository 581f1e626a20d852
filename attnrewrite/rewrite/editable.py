"""A graph in which sites can be replaced: one module's own, or a whole captured one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from ..capture import CapturedGraph
from ..errors import Refusal

OWN = "attnrewrite_"
"""Begins the names of the children and buffers that are added."""


@dataclass
class Editable:
    """``graph`` restates nodes of the ``capture``.

    ``made[node]`` are the values that stand for captured ``node``, in the order they were made: a child that hands its
    input on (an inactive DropPath) makes a second one. ``constants`` and ``modules`` are to be added to what runs the
    graph; ``tied`` says what holds for the captured size only; ``moved`` are the paths of children that are given
    another value than by the model, such as the map whose windows they projected.
    """

    graph: fx.Graph
    capture: CapturedGraph
    made: dict[Node, list[Node]] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    constants: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    value: Callable[[Node], Node] = field(init=False)
    """The value of a captured node, computed here if it is a constant, or a layout, that was not needed before."""

    def __post_init__(self) -> None:
        self.value = self.latest

    @property
    def taken(self) -> set[str]:
        """Names that a new child cannot have."""
        return set(self.modules)

    def first(self, captured: Node) -> Node:
        """What computes ``captured``."""
        if captured not in self.made:
            raise Refusal(f"{captured.name} is computed inside a child module that is not opened")
        return self.made[captured][0]

    def latest(self, captured: Node) -> Node:
        """What later code uses for ``captured``."""
        self.first(captured)
        return self.made[captured][-1]

    def argument(self, consumer: Node, captured: Node) -> Node:
        """The value that stands for ``captured`` where ``consumer`` uses it."""
        before, _ = tree_flatten((consumer.args, consumer.kwargs))
        after, _ = tree_flatten((self.first(consumer).args, self.first(consumer).kwargs))
        return next(new for old, new in zip(before, after, strict=True) if old is captured)

    def add_module(self, stem: str, module: nn.Module) -> str:
        name = next(n for n in _numbered(f"{OWN}{stem}") if n not in self.taken)
        self.modules[name] = module
        return name

    def add_constant(self, value: Tensor) -> Node:
        name = f"{OWN}constant_{len(self.constants)}"
        self.constants[name] = value
        return self.graph.get_attr(name)

    def guard_tables(self, bias: Node) -> None:
        """Note whatever has to keep its shape for ``bias`` to be read off by position: nothing that is given."""


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 1
    while True:
        yield f"{stem}_{number}"
        number += 1
