"""What a site can become, and how sites are found: the interface of targets and of recognizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import Node

from ..errors import ArgumentError, nearest
from ..graph.dataflow import Dataflow
from .core import AttentionCore, StageCore
from .sites import Grid, Refused, Site


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
class Conversion(ABC):
    """One site's conversion. What takes the place of its computation depends on how much of that goes: see the kinds.

    Args:
        exactness: how much of the function is kept.
        why: one clause.
        settings: for the report.
        benefit: whether the target is cheaper as soon as it is converted.
    """

    exactness: Exactness
    why: str
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    benefit: str = field(default="", kw_only=True)

    @property
    def keeps_function(self) -> bool:
        return self.exactness >= Exactness.CONTINUOUS

    @property
    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The new modules."""


def _require(core: nn.Module, kind: type[AttentionCore] | type[StageCore]) -> None:
    if not isinstance(core, kind):
        raise ArgumentError(
            f"core: expected an attnrewrite.ir.core.{kind.__name__}, got {type(core).__name__}; make it a subclass"
        )


@dataclass(frozen=True)
class _ByOneCore(Conversion):
    """A ``core`` of the ``kind`` that the site needs."""

    kind: ClassVar[type[AttentionCore] | type[StageCore]]
    core: nn.Module

    def __post_init__(self) -> None:
        _require(self.core, self.kind)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.core]


@dataclass(frozen=True)
class BetweenProjections(_ByOneCore):
    """The ``core`` mixes the values of an attention site, whose projections stay."""

    kind = AttentionCore
    core: AttentionCore


@dataclass(frozen=True)
class BetweenLinears(Conversion):
    """Each of ``cores`` takes the place of one stage of an MLP, whose linear maps stay; None leaves the stage live."""

    cores: Sequence[StageCore | None]

    def __post_init__(self) -> None:
        for core in self.modules:
            _require(core, StageCore)

    @property
    def modules(self) -> list[nn.Module]:
        return [core for core in self.cores if core is not None]


@dataclass(frozen=True)
class BesideStem(_ByOneCore):
    """The ``core`` takes the place of what stands between a stem's linear map and its tokens: behind a convolution,
    before the map of gathered patches."""

    kind = StageCore
    core: StageCore


@dataclass(frozen=True)
class Adapter:
    """How a module runs where a site's values lie otherwise than it takes them: ``run(module, source, *sizes)``."""

    run: Callable[..., Tensor]
    sizes: tuple[int, ...] = ()

    def at(self, grid: Grid | None) -> Adapter:
        """The same where the site's map is ``grid``, on another look at the model."""
        return self


@dataclass(frozen=True)
class MapAdapter(Adapter):
    """The same, with the height, width and prefix tokens of the site's map as ``sizes``."""

    def at(self, grid: Grid | None) -> MapAdapter:
        return self if grid is None else MapAdapter.on(self.run, grid)

    @classmethod
    def on(cls, run: Callable[..., Tensor], grid: Grid) -> MapAdapter:
        return cls(run, (grid.height, grid.width, grid.prefix_tokens))


@dataclass(frozen=True)
class WholeSite(Conversion):
    """The ``core`` takes the site's source to its result by itself; the site's own linear maps are dropped.

    Args:
        core: any module of one tensor.
        adapter: calls it where its layout is not the site's.
        until: what its result replaces, if that is not the site's own result.
        carried: how many numbers among its parameters are the donor's.
    """

    core: nn.Module
    adapter: Adapter | None = field(default=None, kw_only=True)
    until: Node | None = field(default=None, kw_only=True)
    carried: int = field(default=0, kw_only=True)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.core]

    def run(self, source: Tensor) -> Tensor:
        """The result for the site's ``source``."""
        result: Tensor = (
            self.core(source) if self.adapter is None else self.adapter.run(self.core, source, *self.adapter.sizes)
        )
        return result


Weights = Callable[[Node], Tensor]
"""The value of a constant of the captured graph: a parameter, or what is computed from parameters alone."""

RIDGE = 1e-3
"""Strength of a refit's ridge towards the carried weights, relative to the mean diagonal of the Gram matrix."""


class Target(ABC):
    """A family of conversions. Subclasses are dataclasses of options; those with a name are discovered."""

    name: str = ""
    kinds: tuple[str, ...] = ("attention",)

    @abstractmethod
    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        """The conversion of ``site``, the ``index``-th of its kind that is converted.

        Raises:
            Refusal: with reason and remedy.
        """

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        """``conversion``, refitted where only data tell the best weights.

        ``values`` gives what the site's inputs and its result were on the example input.
        """
        return conversion

    def __str__(self) -> str:
        return self.name


Recognizer = Callable[[Dataflow, list[Site]], list[Site | Refused]]
"""Sites of one kind, given the sites that were found before; those that could not be lifted with the reason."""


def recognizer(order: int) -> Callable[[Recognizer], Recognizer]:
    """Mark a function of ``patterns`` as a recognizer; lower ``order`` runs earlier."""

    def mark(function: Recognizer) -> Recognizer:
        function.order = order  # type: ignore[attr-defined]  # the mark by which it is discovered
        return function

    return mark
