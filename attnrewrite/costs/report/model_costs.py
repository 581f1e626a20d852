"""The costs of one model: counts at one size, formulas for every size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from sympy import Expr
from torch import nn

from ...algebra.symbols import B, envelope, evaluator, leading, order
from ...capture.examples import Inputs
from ...errors import ArgumentError
from ..count.cost import Cost, counted
from ..count.size_tracer import SizeTracer
from ..count.trace import Trace, Unpriced
from ..count.training import Training, training_costs
from ..count.work import Work, derive_work
from ..sites.counted_site import CountedSite
from ..sites.model_formula import Check, ModelFormula, derive, lattices
from .evaluation import Evaluation, item_bytes


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


class ModelCosts:
    """Costs of one model as data, of which every form of a report is a view.

    Counts (``total``, ``cost``, ``modules``, ``unsupported``, ``parameters``) come from one pass on the meta device.
    Formulas (``sites``, ``at``, ``order``, ``expression``, ``checks``, ``assumptions``) are derived from the captured
    graph when they are first asked for, from the model as it then is, and are checked against the counts.

    Attributes:
        convention: ``mac``, ``flop`` or ``fvcore``: the unit of ``total``.
        model, example: what is analysed, and the arguments of one call; neither is changed.
    """

    def __init__(self, model: nn.Module, example: Inputs, convention: str) -> None:
        self.model, self.example, self.convention = model, example, convention
        self._tracer = SizeTracer(model, example)
        self.name = type(model).__name__
        self.trace: Trace = self._tracer.at_example()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.parameters = Parameters(sum(p.numel() for p in model.parameters()), trainable)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        self.dtype = "float32" if dtype is None else str(dtype).removeprefix("torch.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the example image."""
        return self._tracer.size

    @property
    def batch(self) -> int:
        return self._tracer.batch

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
        return derive(self.model, self.example, self._tracer)

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
        """The formulas at another size, in pixels. Without any side it is the example's; a height alone is a square's.

        Raises:
            ArgumentError: a side or batch that is no whole number of at least 1, a side so small that a map of the
                model would have no cells, or an unknown dtype.
        """
        width = (self.size[1] if height is None else height) if width is None else width
        height = self.size[0] if height is None else height
        batch = self.batch if batch is None else batch
        for name, value in (("height", height), ("width", width), ("batch", batch)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: must be a whole number of at least 1, got {value!r}")
        item = item_bytes(self.dtype if dtype is None else dtype)
        self._require_cells(height, width)
        maps, saved = self._memory
        return Evaluation(
            height=height,
            width=width,
            batch=batch,
            dtype=dtype or self.dtype,
            macs=self.formula.macs(batch, height, width),
            attention_map=maps(batch, height, width),
            saved=saved(batch, height, width) * item,
            extrapolated=all((height, width) != (c.height, c.width) for c in self.checks) and len(self.checks) <= 2,
            _work=lambda: self.work.at(height, width, batch),
            _own_dtype=dtype in (None, self.dtype),
        )

    def _require_cells(self, height: int, width: int) -> None:
        """Each side is judged beside the example's other one: two sides that are too small may hide each other."""
        rows, columns = self.size
        self._require_fitting("height", height, rows, lambda side: self.formula.has_cells(side, columns))
        self._require_fitting("width", width, columns, lambda side: self.formula.has_cells(rows, side))

    def _require_fitting(self, argument: str, side: int, seen: int, fits: Callable[[int], bool]) -> None:
        if not fits(side):
            least = next((larger for larger in range(side + 1, seen) if fits(larger)), seen)
            raise ArgumentError(
                f"{argument}: at {side} px a map of {self.name} is empty; use {least} px or more"
            )

    @cached_property
    def work(self) -> Work:
        """Elementwise operations and bytes of the model and of the modules that hold its sites, as polynomials."""
        paths = [site.name for site in self.sites]
        return derive_work(self._tracer, paths, lattices(self.lattice, self.size))

    @cached_property
    def training(self) -> Training:
        """Backward pass, training step, and peaks of memory, on the example."""
        return training_costs(self._tracer, self.parameters.total, self.model)

    @cached_property
    def _memory(self) -> Any:
        formulas = [site.formula for site in self.sites if site.formula is not None]
        maps = sympy.Add(*(f.in_pixels(f.attention_map) for f in formulas))
        saved = sympy.Add(*(f.in_pixels(f.saved) for f in formulas))
        return evaluator(B * maps), evaluator(B * saved)
