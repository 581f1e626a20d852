"""One call of one module, as it was traced: what went in, what came out, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from .size_terms import Term


@dataclass(frozen=True)
class NodeRef:
    """Stands for a traced tensor inside a call's arguments or result; ``node`` is None if it was not traced."""

    node: Node | None


@dataclass
class ModuleCall:
    """One call of one module. ``enter`` and ``exit`` bound the trace positions of its nodes, half open. ``sizes`` are,
    for every leaf of its arguments, where it comes from if it is a number that comes from sizes."""

    path: str
    module: nn.Module
    enter: int
    arguments: dict[str, Any]
    exit: int = -1
    output: Any = None
    parent: ModuleCall | None = None
    children: list[ModuleCall] = field(default_factory=list)
    sizes: list[Term | None] = field(default_factory=list)

    def encloses(self, position: int) -> bool:
        return self.enter <= position < self.exit

    def walk(self) -> Iterator[ModuleCall]:
        """The call and all below it, in the order they were made."""
        yield self
        for child in self.children:
            yield from child.walk()

    def __repr__(self) -> str:
        return f"ModuleCall({self.path!r}, {type(self.module).__name__}, [{self.enter}, {self.exit}))"
