"""What a module of a map says of its cost: a formula of the map's sides, and how a call of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from torch import nn

from .site_formula import Extent, SiteFormula


@dataclass(frozen=True)
class CostedCall:
    """How to read a call of a module that states its cost.

    Attributes:
        argument: the forward's argument that holds the map; ``channels_first`` says how.
        beside: further arguments, which change no cost; any other one does.
        counted_by_formula: whether the formula is the count, whatever operations the module is made of. Some products
            are not spelled as contractions, and some contractions stand for something else. Other formulas have to
            equal the count.
        kind: of site.
        result: the sides of the map that the module makes, where those are others; ``result_first`` says how that
            lies.
    """

    argument: str = "source"
    beside: tuple[str, ...] = ()
    channels_first: bool = False
    counted_by_formula: bool = False
    kind: str = "attention"
    result: Callable[[Extent, Extent], tuple[Extent, Extent]] | None = None
    result_first: bool = False

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the map in an argument of this shape."""
        return (shape[2], shape[3]) if self.channels_first else (shape[1], shape[2])

    def result_sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the map in a result of this shape."""
        return (shape[2], shape[3]) if self.result_first else (shape[1], shape[2])

    def is_plain(self, arguments: dict[str, Any]) -> bool:
        """Whether the map is the only thing that changes the cost."""
        return all(v is None for name, v in arguments.items() if name != self.argument and name not in self.beside)


class CostedModule(Protocol):
    """A module that knows its cost on every map.

    A class states ``costed_call`` itself; what it inherits does not count, for its forward may cost something else.
    """

    costed_call: ClassVar[CostedCall]

    def formula(self, height: Extent, width: Extent) -> SiteFormula | None:
        """The cost per image on a map of these sides; None for options that no formula covers."""


def costed_module(module: nn.Module) -> CostedModule | None:
    """The module, if it states its cost."""
    stated = isinstance(vars(type(module)).get("costed_call"), CostedCall)
    return cast(CostedModule, module) if stated else None
