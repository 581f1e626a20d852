"""Numbers that come from the sizes of traced values, as terms: the sides of values, and arithmetic on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

Number = int | float


@dataclass(frozen=True)
class Side:
    """The extent of one axis of a traced value. ``node`` is that of the trace until ``SizeRecord.resolve``; None after
    it if nothing but this size was asked of the value, which the graph then has not."""

    node: Node | None
    axis: int
    extent: int


@dataclass(frozen=True)
class Arithmetic:
    """What a forward computed from sizes: a Python operator and its operands."""

    function: Callable[..., Any]
    operands: tuple[Term | Number, ...]


Term = Side | Arithmetic
