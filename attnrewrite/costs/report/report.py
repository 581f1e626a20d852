"""What ``analyze`` returns: counts at one size, formulas for every size, and views of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
from sympy import Expr
from torch import nn

from ...capture.examples import Inputs
from ...errors import ArgumentError
from ..algebra.crossover import crossings
from ..algebra.symbols import B, envelope, evaluator, leading, order
from ..count.cost import Cost, counted
from ..count.size_tracer import Sizer
from ..count.trace import Trace, Unpriced
from ..count.training import Training, training_costs
from ..count.work import Work, derive_work
from ..sites.model_formula import Check, ModelFormula, derive, lattices
from ..sites.site_reader import CountedSite
from .comparison import Comparison
from .hardware import Hardware, Roofline, hardware_of, point

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements, shared ones once."""

    total: int
    trainable: int


@dataclass(frozen=True)
class ModuleCost:
    """One module with all that is inside it, of one call of the model."""

    name: str
    kind: str
    calls: int
    parameters: int
    cost: Cost


@dataclass(frozen=True)
class Evaluation:
    """The formulas at one size. ``extrapolated``: the model itself was not seen to take this size.

    ``attention_map`` (elements) and ``saved`` (bytes, of the unfused form, sites only) are of the sites.
    ``elementwise``, ``normalisation``, ``bytes_read`` and ``bytes_written`` are the model's, from ``Report.work``, that
    is derived when one of them is first asked for. They are None where neither a polynomial nor the model itself
    answers, and bytes for another dtype than the model's.
    """

    height: int
    width: int
    batch: int
    dtype: str
    macs: int
    attention_map: int
    saved: int
    extrapolated: bool
    _work: Callable[[], Cost | None] = field(repr=False, compare=False)
    _own_dtype: bool = field(repr=False, compare=False)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def elementwise(self) -> int | None:
        return None if (cost := self._work()) is None else cost.elementwise

    @property
    def normalisation(self) -> int | None:
        return None if (cost := self._work()) is None else cost.normalisation

    @property
    def bytes_read(self) -> int | None:
        return None if not self._own_dtype or (cost := self._work()) is None else cost.bytes_read

    @property
    def bytes_written(self) -> int | None:
        return None if not self._own_dtype or (cost := self._work()) is None else cost.bytes_written


class Report:
    """Costs of one model.

    Counts (``total``, ``cost``, ``modules``, ``unsupported``, ``parameters``) come from one pass on the meta device.
    Formulas (``sites``, ``at``, ``order``, ``expression``, ``crossover``, ``checks``, ``assumptions``) are derived from
    the captured graph when they are first asked for, from the model as it then is, and are checked against the counts.

    Attributes:
        convention: ``mac``, ``flop`` or ``fvcore``: the unit of ``total``.
        model, example: what is analysed, and the arguments of one call; neither is changed.
        comparisons: what stands beside the model in every form of the report: other models, conversions not made.
    """

    def __init__(self, model: nn.Module, example: Inputs, convention: str, hardware: Hardware | None = None) -> None:
        self.model, self.example = model, example
        self._sizer = Sizer(model, example)
        self.convention, self.hardware = convention, hardware
        self.name = type(model).__name__
        self.comparisons: list[Comparison] = []
        self.trace: Trace = self._sizer.at_example()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.parameters = Parameters(sum(p.numel() for p in model.parameters()), trainable)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        self.dtype = "float32" if dtype is None else str(dtype).removeprefix("torch.")

    @property
    def comparison(self) -> Comparison | None:
        """The first of ``comparisons``."""
        return self.comparisons[0] if self.comparisons else None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the example image."""
        return self._sizer.size

    @property
    def batch(self) -> int:
        return self._sizer.batch

    @property
    def cost(self) -> Cost:
        """Everything counted in one forward call on the example; ``saved`` is part of ``training``."""
        return self.trace.total

    @property
    def total(self) -> int:
        """The forward call on the example in the report's convention."""
        return counted(self.cost, self.convention)

    @property
    def unsupported(self) -> list[Unpriced]:
        """Operations that compute and have no price: they count nothing in every figure here."""
        return self.trace.unpriced

    @cached_property
    def modules(self) -> list[ModuleCost]:
        """Every module that was called, in the order of ``named_modules``."""
        rows = []
        for path, module in self.model.named_modules():
            calls = self.trace.module_calls.get(path, 0)
            if calls:
                size = sum(p.numel() for p in module.parameters())
                rows.append(ModuleCost(path, type(module).__name__, calls, size, self.trace.of(path)))
        return rows

    @cached_property
    def uncalled_modules(self) -> list[str]:
        """Modules with parameters of their own that were not called; others may still have used their parameters."""
        own = [(path, list(m.parameters(recurse=False))) for path, m in self.model.named_modules()]
        return [path for path, found in own if found and path not in self.trace.module_calls]

    @cached_property
    def formula(self) -> ModelFormula:
        """The whole model's formula with its sites, checks and assumptions."""
        return derive(self.model, self.example, self._sizer)

    @property
    def sites(self) -> list[CountedSite]:
        return self.formula.sites

    @property
    def checks(self) -> list[Check]:
        """Formula against count: at the example, at another batch, at other sizes where the model takes them."""
        return self.formula.checks

    @property
    def assumptions(self) -> list[str]:
        notes = list(self.formula.assumptions)
        notes += [f"formula and count differ: {check}" for check in self.checks if not check.equal]
        notes += [f"no formula: {site.name or '(root)'}: {site.why}" for site in self.sites if site.formula is None]
        return notes

    @property
    def expression(self) -> Expr:
        """MACs of one forward call in ``B``, ``H`` and ``W``."""
        return B * self.formula.per_image + self.formula.once

    @property
    def polynomial(self) -> Expr:
        """MACs of one image where no rounding rounds (``lattice``) and no map is smaller than a kernel."""
        return envelope(self.formula.per_image + self.formula.once)

    @property
    def lattice(self) -> int:
        """The polynomial holds on multiples of so many pixels."""
        return self.formula.lattice

    @cached_property
    def order(self) -> str:
        """Θ of the forward cost in the number of pixels n."""
        return order(self.formula.per_image)

    @property
    def dominant_memory(self) -> Expr:
        """Elements an image that the sites keep for the backward pass, unfused: the part that grows fastest."""
        kept = sympy.Add(*(site.formula.in_pixels(site.formula.saved) for site in self.sites if site.formula))
        return leading(envelope(kept))

    def at(
        self, height: int | None = None, width: int | None = None, batch: int | None = None, dtype: str | None = None
    ) -> Evaluation:
        """The formulas at another size; None keeps the example's.

        Raises:
            ArgumentError: a side or batch below 1, or an unknown dtype.
        """
        height, width = height or self.size[0], width or height or self.size[1]
        batch, dtype = self.batch if batch is None else batch, dtype or self.dtype
        for name, value in (("height", height), ("width", width), ("batch", batch)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: must be a whole number of at least 1, got {value!r}")
        if dtype not in ITEM_BYTES:
            raise ArgumentError(f"dtype: {dtype!r} is not known; use one of {', '.join(ITEM_BYTES)}")
        maps, saved = self._memory
        return Evaluation(
            height, width, batch, dtype,
            macs=self.formula.macs(batch, height, width),
            attention_map=maps(batch, height, width),
            saved=saved(batch, height, width) * ITEM_BYTES[dtype],
            extrapolated=all((height, width) != (c.height, c.width) for c in self.checks) and len(self.checks) <= 2,
            _work=lambda: self.work.at(height, width, batch), _own_dtype=dtype == self.dtype,
        )  # fmt: skip

    @cached_property
    def work(self) -> Work:
        """Elementwise operations and bytes of the model and of the modules that hold its sites, as polynomials."""
        paths = [site.name for site in self.sites]
        return derive_work(self._sizer, paths, lattices(self.lattice, self.size))

    def compare(self, other: Report) -> Comparison:
        """This model before, ``other`` after."""
        return Comparison.of_reports(self, other)

    def crossover(self, other: Report | Comparison, wrt: str = "pixels") -> list[float]:
        """Every side of a square image, in pixels, at which both models' costs are equal, without padding.

        Raises:
            ArgumentError: ``wrt`` is not ``"pixels"``.
        """
        if wrt != "pixels":
            raise ArgumentError(f'wrt: crossovers are given in "pixels" of a square image\'s side, got {wrt!r}')
        return crossings(self.formula.per_image + self.formula.once, other.formula.per_image + other.formula.once)

    @cached_property
    def training(self) -> Training:
        """Backward pass, training step, and peaks of memory, on the example."""
        return training_costs(self._sizer, self.parameters.total, self.model)

    def roofline(self, hardware: str | Hardware | None = None, dtype: str = "bfloat16") -> Roofline:
        """Every site's attention core and linear maps under a machine's roof, at the example's size.

        Args:
            hardware: a name of the table (``h200``, ``h100``, ``a100``, ``l4``) or a ``Hardware``.

        Raises:
            ArgumentError: unknown hardware or dtype, or none given.
        """
        chosen = hardware or self.hardware
        if chosen is None:
            raise ArgumentError("hardware: none was given; pass a name of the table or a Hardware")
        machine = hardware_of(chosen)
        machine.ridge(dtype)
        points = []
        for site in self.sites:
            points += self._site_points(site, machine, dtype)
        return Roofline(machine, dtype, points)

    def _site_points(self, site: CountedSite, machine: Hardware, dtype: str) -> list[Any]:
        formula = site.formula
        if formula is None:
            return []
        numbers = {
            name: formula.number(getattr(formula, name), *self.size) * self.batch
            for name in ("core", "dense", "moved", "streams")
        }
        points = []
        if numbers["core"]:
            bytes_moved = numbers["moved"] * ITEM_BYTES[dtype]
            points.append(point(machine, dtype, f"{site.name} attention", 2 * numbers["core"], bytes_moved))
        if numbers["dense"] and formula.streams != 0:
            weights = formula.number(formula.weights, *self.size)
            size_bytes = (numbers["streams"] + weights) * ITEM_BYTES[dtype]
            points.append(point(machine, dtype, f"{site.name} linear", 2 * numbers["dense"], size_bytes))
        return points

    @cached_property
    def _memory(self) -> Any:
        formulas = [site.formula for site in self.sites if site.formula is not None]
        maps = sympy.Add(*(f.in_pixels(f.attention_map) for f in formulas))
        saved = sympy.Add(*(f.in_pixels(f.saved) for f in formulas))
        return evaluator(B * maps), evaluator(B * saved)

    def to_records(self) -> list[dict[str, Any]]:
        """One plain dictionary a site, for a data frame."""
        from .json_form import records

        return records(self)

    def to_dict(self) -> dict[str, Any]:
        from .json_form import as_dict

        return as_dict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON with a schema version; expressions as ``srepr``, plain text and LaTeX. Written to ``path`` if given."""
        from .json_form import as_json

        text = as_json(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_markdown(self) -> str:
        from .text import markdown

        return markdown(self)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page (no scripts, nothing loaded) and return its path."""
        from .html import page

        Path(path).write_text(page(self), encoding="utf-8")
        return Path(path)

    def plot(self, axes: Any = None) -> Any:
        """Cost over the side of a square image with matplotlib; returns the axes.

        Raises:
            ArgumentError: matplotlib is not installed.
        """
        from .plot import plot

        return plot(self, axes)

    def __str__(self) -> str:
        from .text import terminal

        return terminal(self)

    def __repr__(self) -> str:
        return f"<Report of {self.name} at {self.size[0]}x{self.size[1]}: {self.total} {self.convention}>"

    def _repr_html_(self) -> str:
        from .html import fragment

        return fragment(self)
