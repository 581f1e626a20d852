"""One call of one module, as it was traced: what went in, what came out, and when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from .size_terms import Term


@dataclass(frozen=True)
class NodeRef:
    """Stands for a traced tensor inside a call's arguments or result; ``node`` is None if it was not traced."""

    node: Node | None


@dataclass
class ModuleCall:
    """One call of one module, at ``path``, of the class ``kind``. ``enter`` and ``exit`` bound the trace positions of
    its nodes, half open. ``sizes`` are, for every leaf of its arguments, where it comes from if it is a number that
    comes from sizes."""

    path: str
    kind: str
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
        return f"ModuleCall({self.path!r}, {self.kind.rpartition('.')[2]}, [{self.enter}, {self.exit}))"


def class_name(kind: type) -> str:
    """What a call says of the class of its module."""
    return f"{kind.__module__}.{kind.__qualname__}"
