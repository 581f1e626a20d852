"""A model's formula: its sites', what they leave as an interpolated polynomial, and both checked against counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import sympy
from sympy import Expr, Integer
from torch import nn

from ...algebra.interpolate import fitted
from ...algebra.site_formula import ZERO, SiteFormula
from ...algebra.symbols import evaluator, lattice_unit, plain
from ...capture.examples import Inputs
from ...capture.replica import without_hooks
from ...errors import ArgumentError, CaptureError, first_line
from ...planning.plan import Plan
from ...planning.stages import lifted
from ..count.size_tracer import SizeTracer
from .counted_site import CountedSite
from .site_reader import SiteReader

PROBES = 2


@dataclass(frozen=True)
class Check:
    """Formula and count, in MACs, at one size."""

    height: int
    width: int
    batch: int
    formula: int
    count: int

    @property
    def equal(self) -> bool:
        return self.formula == self.count

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}" + (f" batch {self.batch}" if self.batch > 1 else "")
        verdict = "equal" if self.equal else f"formula {self.formula:,}, off by {self.formula - self.count:+,}"
        return f"{size}: {verdict} ({self.count:,} MAC)".replace(",", " ")


@dataclass
class ModelFormula:
    """MACs of a whole model in ``H``, ``W`` and batch: ``batch * per_image + once``.

    Attributes:
        sites: with their formulas; those without are part of the rest.
        rest, rest_once: what belongs to no formula, per image and per call, exact on multiples of ``rest_unit`` pixels.
        checks: the formula against counts.
        refused: what looked like a site and could not be lifted.
        lifted: everything that was recognized; None if the model could not be captured.
    """

    sites: list[CountedSite]
    rest: Expr = ZERO
    rest_once: Expr = ZERO
    rest_unit: int = 1
    checks: list[Check] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    lifted: Plan | None = field(default=None, repr=False)

    @cached_property
    def per_image(self) -> Expr:
        return sympy.Add(*(f.total - f.in_pixels(f.once) for f in self._formulas), self.rest)

    @cached_property
    def once(self) -> Expr:
        return sympy.Add(*(f.in_pixels(f.once) for f in self._formulas), self.rest_once)

    @cached_property
    def macs(self) -> Callable[[int, int, int], int]:
        """``(batch, height, width) -> MACs``."""
        image, once = evaluator(self.per_image), evaluator(self.once)
        return lambda batch, height, width: batch * image(1, height, width) + once(1, height, width)

    @cached_property
    def lattice(self) -> int:
        return math.lcm(*map(lattice_unit, {f.total for f in self._formulas}), self.rest_unit)

    def has_cells(self, height: int, width: int) -> bool:
        """Whether the sites' maps, their keys and their groups have a cell at this size."""
        return all(extent(1, height, width) > 0 for extent in self._extents)

    @cached_property
    def _extents(self) -> list[Callable[[int, int, int], int]]:
        """The values of the sites' symbols that depend on the image."""
        values = {value for formula in self._formulas for value in formula.values.values() if value.free_symbols}
        return [evaluator(value) for value in values]

    @property
    def _formulas(self) -> list[SiteFormula]:
        return [site.formula for site in self.sites if site.formula is not None]


def derive(model: nn.Module, example: Inputs, tracer: SizeTracer) -> ModelFormula:
    """Lift the sites of ``model`` and complete their formulas to the whole model's."""
    count = tracer.at_example().total.macs
    if not tracer.has_image:
        note = "no image among the inputs: the cost is a number, of this batch"
        return ModelFormula([], rest_once=Integer(count), assumptions=[note])
    try:
        plan = lifted_without_hooks(model, example)
    except (CaptureError, ArgumentError) as cause:
        found = ModelFormula([])
        found.assumptions.append(f"no sites, the model could not be captured: {first_line(cause)}")
        _complete(found, tracer)
        return found
    found = _read(plan, tracer)
    found.lifted = plan
    found.refused = [f"{refused.name or '(root)'}: {refused.reason}" for refused in plan.refused]
    return found


def lifted_without_hooks(model: nn.Module, example: Inputs) -> Plan:
    """As ``planning.lifted``; like the count, it never runs a hook, and what a hook computes has no cost here.

    Raises:
        ArgumentError, CaptureError: as ``capture`` does.
    """
    args, kwargs = example
    return lifted(without_hooks(model), kwargs if kwargs and not args else args)


def _read(plan: Plan, tracer: SizeTracer) -> ModelFormula:
    """Whether mergings pad or cut odd maps is not seen at one size: the first reading that holds at others is taken."""
    readings, sites = [], [planned.site for planned in plan.sites]
    for odd_up in (True, False):
        reader = SiteReader(plan.capture, plan.flow, sites, odd_up)
        found = ModelFormula(reader.read())
        readings.append(found)
        if len(set(_rests(found, tracer))) == 1 or not reader.maps.rounds_merges:
            break
    holding = [found for found in readings if len(set(_rests(found, tracer))) == 1]
    found = holding[0] if holding else ModelFormula(_without_refuted(readings[0], tracer))
    _complete(found, tracer)
    return found


def _without_refuted(found: ModelFormula, tracer: SizeTracer) -> list[CountedSite]:
    """Sites whose formula does not equal the count of their module at another size lose it."""
    here = tracer.at_example()
    kept = []
    for site in found.sites:
        if site.formula is not None and site.name and here.of(site.name).macs == site.macs:
            for size in _probe_sizes(tracer, found.lattice):
                counted = tracer.at(*size)
                if counted is not None and counted.of(site.name).macs != site.formula.macs_of(tracer.batch, *size):
                    why = f"its formula holds at {tracer.size[0]}x{tracer.size[1]} and not at {size[0]}x{size[1]}"
                    site = replace(site, formula=None, why=why)
                    break
        kept.append(site)
    return kept


def _points(found: ModelFormula, tracer: SizeTracer) -> list[tuple[int, int]]:
    return [tracer.size, *_probe_sizes(tracer, found.lattice)]


def _rests(found: ModelFormula, tracer: SizeTracer) -> list[tuple[int, int]]:
    """What the sites leave at the example and at other sizes."""
    points = _points(found, tracer)
    first = _rest(found, tracer, *points[0])
    return [first, *(_rest(found, tracer, *point, both=first[1] != 0) for point in points[1:])]


def _complete(found: ModelFormula, tracer: SizeTracer) -> None:
    """Find what the sites leave, and check the sum at the example, at another batch, and at other sizes."""
    points, rests = _points(found, tracer), _rests(found, tracer)
    if len(points) == 1:
        found.assumptions.append(
            f"the model takes no size but {tracer.size[0]}x{tracer.size[1]}: other sizes are extrapolated by its "
            "formulas, and what is no site is taken to stay the same"
        )
    if len(set(rests)) == 1:
        found.rest, found.rest_once = Integer(rests[0][0]), Integer(rests[0][1])
    else:
        _interpolate(found, tracer)
    for name in ("per_image", "once", "macs", "lattice"):
        found.__dict__.pop(name, None)
    for point in points:
        _check(found, tracer, *point, tracer.batch)
    _check(found, tracer, *tracer.size, tracer.batch + 1)


def _check(found: ModelFormula, tracer: SizeTracer, height: int, width: int, batch: int) -> None:
    counted = tracer.at(height, width, batch)
    if counted is not None:
        found.checks.append(Check(height, width, batch, found.macs(batch, height, width), counted.total.macs))


def _rest(found: ModelFormula, tracer: SizeTracer, height: int, width: int, both: bool = True) -> tuple[int, int]:
    """What the sites leave at a size: per image, and per call whatever the batch (0 unless ``both`` are asked for)."""
    batch = tracer.batch
    one, two = tracer.at(height, width, batch), tracer.at(height, width, batch + 1) if both else None
    assert one is not None
    first = one.total.macs - found.macs(batch, height, width)
    if two is None:
        return first // batch, 0
    second = two.total.macs - found.macs(batch + 1, height, width)
    return second - first, first - batch * (second - first)


def _interpolate(found: ModelFormula, tracer: SizeTracer) -> None:
    """The rest as polynomials, exact on the lattice; where it is none, the count at the example stands alone."""
    at_example = _rest(found, tracer, *tracer.size)
    parts = (0, 1) if at_example[1] else (0,)
    for unit in lattices(found.lattice, tracer.size):
        fits = [fitted(partial(_rest_at, found, tracer, parts, part), unit, tracer.size) for part in parts]
        fits += [ZERO] * (2 - len(fits))
        if fits[0] is not None and fits[1] is not None:
            found.rest, found.rest_once, found.rest_unit = fits[0], fits[1], unit
            found.assumptions.append(
                f"{plain(found.rest + found.rest_once)} MAC outside of formulas are interpolated: exact where both "
                f"sides are multiples of {unit} px"
            )
            return
    found.rest, found.rest_once = Integer(at_example[0]), Integer(at_example[1])
    found.assumptions.append("what is no site follows no polynomial in the sides: its count at the example is kept")


def _rest_at(
    found: ModelFormula, tracer: SizeTracer, parts: tuple[int, ...], part: int, height: int, width: int
) -> int | None:
    if tracer.at(height, width) is None:
        return None
    return _rest(found, tracer, height, width, both=len(parts) > 1)[part]


def lattices(lattice: int, size: tuple[int, int]) -> Iterator[int]:
    """Lattices to try: the sites' own, then coarser ones that hold strides and windows the sites do not show."""
    for unit in (lattice, 32, 224, size[0]):
        if unit % lattice == 0 and unit <= 512:
            yield unit


def _probe_sizes(tracer: SizeTracer, lattice: int) -> list[tuple[int, int]]:
    """Up to ``PROBES`` other sizes that the model takes, as awkward as it allows."""
    height, width = tracer.size
    step = lattice if lattice <= 64 else 32
    wanted = [
        (height + height // 8 + 5, width + width // 4 + 3),
        (height + step, width + 2 * step),
        (height + 3 * step, width + step),
        (height + lattice, width + 2 * lattice),
        (height + 2 * lattice, width + 3 * lattice),
        (2 * height, 2 * width),
    ]
    taken: list[tuple[int, int]] = []
    for size in dict.fromkeys(wanted):
        if len(taken) < PROBES and tracer.at(*size) is not None:
            taken.append(size)
    return taken
