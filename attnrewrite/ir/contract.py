"""What a site can become, and how sites are found: the interface of targets and of recognisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..errors import ArgumentError, nearest
from ..graph.dataflow import Dataflow
from .sites import Refused, Site


class Exactness(IntEnum):
    """How much of the function a conversion keeps; a higher one keeps more."""

    FRESH = 0
    PROJECTED = 1
    CONTINUOUS = 2
    EXACT = 3


def exactness_of(name: str, argument: str) -> Exactness:
    """The class of a name as users write it: ``"exact"``, ``"continuous"``, ``"projected"`` or ``"fresh"``.

    Raises:
        ArgumentError: any other name, given as ``argument``.
    """
    known = [level.name.lower() for level in Exactness]
    wanted = str(name).lower()
    if wanted not in known:
        expected = f"{argument}: expected one of {', '.join(known)}, got {name!r}"
        raise ArgumentError(f"{expected}{nearest(wanted, known)}")
    return Exactness[wanted.upper()]


@dataclass(frozen=True)
class Conversion:
    """One site's conversion: ``core`` takes the place of the site's computation.

    ``why`` is one clause; ``benefit`` says whether the target is cheaper as soon as it is converted. ``extras`` are
    given to the core by keyword, beside its operands: ``local``, as ``local_key`` and ``local_value`` an attention
    site's keys and values of the query map itself, ``[B, H, W, heads, dim]``, where it attends to a reduced one;
    ``pixels``, in the place of its keys and values, what feeds its query projection, ``[B, tokens, channels]``;
    ``source``, what feeds an MLP's or stem's first linear map. A ``whole`` core takes the site's source to its result
    by itself, and the site's own linear maps are dropped; where its layout is not the site's, ``run`` calls it, with
    core, source and ``sizes``: height, width and prefix tokens of the site's map if it runs ``on_tokens``. ``until`` is
    what such a core's result replaces, if that is not the site's own result, and ``carried`` how many numbers among its
    parameters are the donor's.
    """

    exactness: Exactness
    why: str
    core: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    benefit: str = ""
    extras: tuple[str, ...] = ()
    whole: bool = False
    run: Callable[..., Tensor] | None = None
    sizes: tuple[int, ...] = ()
    on_tokens: bool = False
    until: Node | None = None
    carried: int = 0

    @property
    def keeps_function(self) -> bool:
        return self.exactness >= Exactness.CONTINUOUS


Weights = Callable[[Node], Tensor]
"""The value of a constant of the captured graph: a parameter, or what is computed from parameters alone."""

RIDGE = 1e-3
"""Strength of a refit's ridge towards the carried weights, relative to the mean diagonal of the Gram matrix."""


class NotConvertible(Exception):
    """A site has no meaning in a target: the reason, and what would work instead."""


class NothingToDo(NotConvertible):
    """A site is already what the target would make of it."""


class Target(ABC):
    """A family of conversions. Subclasses are dataclasses of options; those with a name are discovered."""

    name: str = ""
    kinds: tuple[str, ...] = ("attention",)

    @abstractmethod
    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        """The conversion of ``site``, the ``index``-th of its kind that is converted.

        Raises:
            NotConvertible: with reason and remedy.
        """

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        """``conversion``, refitted where only data tell the best weights.

        ``values`` gives what the site's inputs and its result were on the example input.
        """
        return conversion

    def measure(
        self, conversion: Conversion, site: Site, operands: tuple[Tensor, Tensor, Tensor], queries: Tensor
    ) -> dict[str, Any]:
        """What can be said of an inexact conversion from heads-last query, key and value of the example input.

        Of the query tokens only those at ``queries`` are given: a sample where they are many.
        """
        return {}

    def __str__(self) -> str:
        return self.name


Recogniser = Callable[[Dataflow, list[Site]], list[Site | Refused]]
"""Sites of one kind, given the sites that were found before; those that could not be lifted with the reason."""


def recogniser(order: int) -> Callable[[Recogniser], Recogniser]:
    """Mark a function of ``patterns`` as a recogniser; lower ``order`` runs earlier."""

    def mark(function: Recogniser) -> Recogniser:
        function.order = order  # type: ignore[attr-defined]  # the mark by which it is discovered
        return function

    return mark
