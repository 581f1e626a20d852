"""What is counted beside MACs (elementwise operations, bytes) as polynomials in the image's sides.

No site formula covers these: they are what the operations of a module add up to, so they are interpolated through exact
counts on a lattice of sizes, and checked against two further counts. They hold for one batch: a rearrangement that
copies several images is often a view of a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

from sympy import Expr

from ...algebra.interpolate import fitted
from ...algebra.symbols import evaluator
from .cost import Cost
from .size_tracer import SizeTracer

PARTS = ("elementwise", "normalization", "bytes_read", "bytes_written")
"""Of a ``Cost``, what has a polynomial here."""


@dataclass(frozen=True)
class ModuleWork:
    """One module with all that is inside it: expressions in ``H`` and ``W`` for ``batch`` images.

    They are exact on multiples of ``unit`` pixels from the sides ``least`` up (a map of a single window may be treated
    otherwise than larger ones). Bytes are those of the model's own dtypes.
    """

    elementwise: Expr
    normalization: Expr
    bytes_read: Expr
    bytes_written: Expr
    unit: int
    batch: int
    least: tuple[int, int]

    def at(self, height: int, width: int) -> Cost | None:
        """Its numbers at a size, the MACs left out; None off the lattice."""
        if height % self.unit or width % self.unit or height < self.least[0] or width < self.least[1]:
            return None
        return Cost(**{part: compute(self.batch, height, width) for part, compute in self._evaluators.items()})

    @cached_property
    def _evaluators(self) -> dict[str, Callable[[int, int, int], int]]:
        return {part: evaluator(getattr(self, part)) for part in PARTS}


@dataclass
class Work:
    """Of a model, by module path (the root is ``""``); modules whose work is no polynomial are left out."""

    tracer: SizeTracer = field(repr=False)
    modules: dict[str, ModuleWork] = field(default_factory=dict)

    def at(self, height: int, width: int, batch: int, path: str = "") -> Cost | None:
        """Of a module: by its polynomials, else counted if the model takes the size, else None. MACs are left out."""
        found = self.modules.get(path)
        cost = None if found is None or found.batch != batch else found.at(height, width)
        if cost is not None:
            return cost
        counted = self.tracer.at(height, width, batch)
        return None if counted is None else Cost(**{part: getattr(counted.of(path), part) for part in PARTS})


def derive_work(tracer: SizeTracer, paths: list[str], units: Iterator[int]) -> Work:
    """The work of some modules on the first lattice of ``units`` whose sizes the model takes."""
    found = Work(tracer)
    if not tracer.has_image:
        return found
    for unit in units:
        for path in dict.fromkeys(["", *paths]):
            made = _module_work(tracer, path, unit)
            if made is not None:
                found.modules[path] = made
        if found.modules:
            return found
    return found


def _module_work(tracer: SizeTracer, path: str, unit: int) -> ModuleWork | None:
    height, width = tracer.size
    for least in ((height, width), (height + unit, width + unit)):
        fits = {part: fitted(partial(_counted, tracer, path, part), unit, least) for part in PARTS}
        parts = {part: polynomial for part, polynomial in fits.items() if polynomial is not None}
        if len(parts) == len(PARTS):
            return ModuleWork(**parts, unit=unit, batch=tracer.batch, least=least)
    return None


def _counted(tracer: SizeTracer, path: str, part: str, height: int, width: int) -> int | None:
    trace = tracer.at(height, width)
    return None if trace is None else int(getattr(trace.of(path), part))
