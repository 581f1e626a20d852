"""What ``analyze`` returns: the costs of a model with what stands beside them, and the views of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ...algebra.crossover import crossings
from ...capture.examples import Inputs
from ...errors import ArgumentError
from .comparison import Comparison
from .hardware import Hardware, hardware_of
from .html import cost_fragment, cost_page
from .json_form import as_dict, as_json, records
from .model_costs import ModelCosts
from .plot import plot
from .roofline import Roofline, roofline
from .text import markdown, terminal


class Report(ModelCosts):
    """Costs of one model, beside others, in every form.

    Attributes:
        comparisons: what stands beside the model in every form of the report: other models, conversions not made.
        hardware: the machine of ``roofline`` and of its chart in the page.
    """

    def __init__(self, model: nn.Module, example: Inputs, convention: str, hardware: Hardware | None = None) -> None:
        super().__init__(model, example, convention)
        self.comparisons: list[Comparison] = []
        self.hardware = hardware

    @property
    def comparison(self) -> Comparison | None:
        """The first of ``comparisons``."""
        return self.comparisons[0] if self.comparisons else None

    def compare(self, other: ModelCosts) -> Comparison:
        """This model before, ``other`` after."""
        return Comparison.of_reports(self, other)

    def crossover(self, other: ModelCosts | Comparison, wrt: str = "pixels") -> list[float]:
        """Every side of a square image, in pixels, at which both models' costs are equal, without padding.

        Raises:
            ArgumentError: ``wrt`` is not ``"pixels"``.
        """
        if wrt != "pixels":
            raise ArgumentError(f'wrt: crossovers are in "pixels" (the side of a square image), got {wrt!r}')
        return crossings(self.formula.per_image + self.formula.once, other.formula.per_image + other.formula.once)

    def roofline(self, hardware: str | Hardware | None = None, dtype: str = "bfloat16") -> Roofline:
        """Every site's attention core and linear maps under a machine's roof, at the example's size.

        Args:
            hardware: a name of the table (``h200``, ``h100``, ``a100``, ``l4``) or a ``Hardware``; default: the
                report's own.

        Raises:
            ArgumentError: unknown hardware or dtype, or none given.
        """
        chosen = hardware or self.hardware
        if chosen is None:
            raise ArgumentError("hardware: required; pass a name from the table or a Hardware")
        return roofline(self.sites, self.size, self.batch, hardware_of(chosen), dtype)

    def to_records(self) -> list[dict[str, Any]]:
        """One plain dictionary a site, for a data frame."""
        return records(self)

    def to_dict(self) -> dict[str, Any]:
        """All of the report in types that JSON has."""
        return as_dict(self, self.comparisons)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON with a schema version; expressions as ``srepr``, plain text and LaTeX. Written to ``path`` if given."""
        text = as_json(self, self.comparisons)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_markdown(self) -> str:
        """A headline, the table of sites, what is true of the whole model, and the comparisons."""
        return markdown(self, self.comparisons)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page (no scripts, nothing loaded) and return its path."""
        Path(path).write_text(cost_page(self, self.comparisons, self._roof()), encoding="utf-8")
        return Path(path)

    def plot(self, axes: Any = None) -> Any:
        """Cost over the side of a square image with matplotlib; returns the axes.

        Raises:
            ArgumentError: matplotlib is not installed.
        """
        return plot(self, self.comparisons, axes)

    def _roof(self) -> Roofline | None:
        return None if self.hardware is None else self.roofline()

    def __str__(self) -> str:
        return terminal(self, self.comparisons)

    def __repr__(self) -> str:
        return f"<Report of {self.name} at {self.size[0]}x{self.size[1]}: {self.total} {self.convention}>"

    def _repr_html_(self) -> str:
        return cost_fragment(self, self.comparisons, self._roof())
