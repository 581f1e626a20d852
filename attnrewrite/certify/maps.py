"""An MLP or a stem in one comparison: from its source to its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..graph.dataflow import Dataflow
from ..graph.values import Values, cast, evaluate, input_of, shape_of
from ..ir.sites import MlpSite, StemSite
from ..numerics.error import relative_error
from . import forms
from .gaussian import gaussian


@dataclass(frozen=True)
class MapCheck:
    """The comparison of one site."""

    site: MlpSite | StemSite
    flow: Dataflow
    misplaced: ClassVar[str] = ""
    sampled: ClassVar[str] = ""

    @property
    def work(self) -> float:
        """Multiplications in the site's linear maps, for its tokens."""
        linears = {self.site.first, self.site.second} if isinstance(self.site, MlpSite) else set()
        sizes = ((self.flow.constants[input_of(node, 1)].numel(), shape_of(node)) for node in linears)
        return float(sum(weights * math.prod(shape[:-1]) for weights, shape in sizes))

    def random_error(self, dtype: torch.dtype) -> float:
        """On a Gaussian source, in ``dtype``."""
        return self._evaluated_error(gaussian([self.site.source], dtype)[self.site.source], dtype)

    def captured_error(self, captured: Values, dtype: torch.dtype) -> float:
        """In ``dtype`` on what the example input gave; casts inside the model would be measured with it."""
        source, result = captured[self.site.source], captured[self.site.result]
        if dtype == torch.float64 or result.dtype != dtype:
            return self._evaluated_error(cast(source, dtype), dtype)
        return self._error(source, result)

    def _evaluated_error(self, source: Tensor, dtype: torch.dtype) -> float:
        result, flow = self.site.result, self.flow
        values = evaluate([result], {self.site.source: source}, flow.capture, flow.constants, dtype)
        return self._error(source, values[result])

    def _error(self, source: Tensor, expected: Tensor) -> float:
        form = forms.mlp if isinstance(self.site, MlpSite) else forms.stem
        actual = form(self.site, source, lambda node: cast(self.flow.constants[node], source.dtype))  # type: ignore[arg-type]  # the form of its kind
        if actual.shape != expected.shape:
            raise ValueError(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
        return relative_error(actual, expected)
