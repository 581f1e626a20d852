"""Neighborhood attention, plain and dilated, from global, windowed and spatially reduced attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..ir import AttentionSite, Global, Grid, Reduced, Site, Window
from ..layout import as_pair
from ..cores import NeighborhoodAttention, ReducedNeighborhoodAttention, WindowAttention
from ..cores.neighborhood import clamped_kernel, covers, neighborhood_mask, reduced_mask
from ..targets import Conversion, Exactness, NotConvertible, Target, Weights, register_target
from .windows import relative_table

Pair = tuple[int, int]


@register_target
@dataclass(frozen=True)
class Neighborhood(Target):
    """Neighborhood attention (Hassani et al. 2023).

    Args:
        kernel_size: per axis or for both. None keeps a window's partition, exactly (a stride equal to the kernel size),
            and takes 7 elsewhere.
        dilation: spacing of the keys, per axis or for both.
        oversize: ``"clamp"`` cuts a kernel that does not fit a map to the largest that does (at ``dilation``), which
            the report says; ``"error"`` refuses the site.
    """

    kernel_size: int | Pair | None = None
    dilation: int | Pair = 1
    oversize: str = "clamp"
    name = "neighborhood"

    def __post_init__(self) -> None:
        if self.kernel_size is not None:
            _require_positive("kernel_size", self.kernel_size)
        _require_positive("dilation", self.dilation)
        if self.oversize not in ("clamp", "error"):
            raise ArgumentError(f"oversize: expected 'clamp' or 'error', got {self.oversize!r}")

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if isinstance(site.keys, Window):
            if self.kernel_size is None and as_pair(self.dilation) == (1, 1):
                return _blocks(site, site.keys)
            raise NotConvertible(
                "a sliding kernel over a windowed site is not built yet; leave kernel_size out for the exact block form"
            )
        if isinstance(site.keys, Reduced):
            return self._reduced(site, site.keys)
        return self._sliding(site, as_pair(self.dilation))

    def _sliding(self, site: AttentionSite, dilation: Pair) -> Conversion:
        grid = _grid_of(site)
        kernel, clamped = self._kernel(site, grid, dilation)
        entries = _bias_entries(site, grid)
        core = NeighborhoodAttention(kernel, dilation, grid, site.scale_of_operands, site.dropout, entries)
        settings = {"kernel_size": kernel, "dilation": dilation}
        if covers(kernel, dilation, grid):
            return Conversion(
                Exactness.EXACT, f"kernel {_text(kernel)} covers the {grid} map{clamped}", core, settings,
                "none at this size: every query still sees every key",
            )  # fmt: skip
        return Conversion(
            Exactness.PROJECTED, f"keys outside kernel {_text(kernel)} dilation {_text(dilation)} are dropped{clamped}",
            core, settings, f"{kernel[0] * kernel[1] + grid.prefix_tokens} of {grid.tokens} keys a query",
        )  # fmt: skip

    def _reduced(self, site: AttentionSite, keys: Reduced) -> Conversion:
        if as_pair(self.dilation) != (1, 1):
            raise NotConvertible("a reduced key map has no dilation; use to='neighborhood' for this site")
        grid, reduced = _grid_of(site), Grid(keys.height, keys.width)
        kernel, clamped = self._kernel(site, reduced, (1, 1))
        core = ReducedNeighborhoodAttention(kernel, grid, reduced, site.scale_of_operands, site.dropout)
        settings = {"kernel_size": kernel, "reduced": str(reduced)}
        if covers(kernel, (1, 1), reduced):
            return Conversion(
                Exactness.EXACT, f"kernel {_text(kernel)} covers the reduced {reduced} map{clamped}", core, settings,
                "none at this size: every query still sees every reduced key",
            )  # fmt: skip
        return Conversion(
            Exactness.PROJECTED, f"reduced keys outside kernel {_text(kernel)} are dropped", core, settings,
            f"{kernel[0] * kernel[1]} of {reduced.tokens} keys a query",
        )  # fmt: skip

    def _kernel(self, site: AttentionSite, grid: Grid, dilation: Pair) -> tuple[Pair, str]:
        wanted = as_pair(7 if self.kernel_size is None else self.kernel_size)
        kernel = clamped_kernel(wanted, dilation, grid)
        if kernel == wanted:
            return kernel, ""
        if self.oversize == "error":
            raise NotConvertible(
                f"kernel {_text(wanted)} with dilation {_text(dilation)} does not fit the {grid} map; "
                f"use kernel_size={kernel} or oversize='clamp'"
            )
        return kernel, f" (clamped from {_text(wanted)})"

    def measure(self, conversion: Conversion, site: Site, operands: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
        """Dropped softmax mass of every head: the mean, over queries, of the attention paid to keys that are lost."""
        assert isinstance(site, AttentionSite)
        core = conversion.core
        if conversion.exactness is Exactness.EXACT:
            return {}
        if isinstance(core, ReducedNeighborhoodAttention):
            seen = reduced_mask(core.kernel_size, core.grid, core.reduced)
        else:
            seen = neighborhood_mask(core.kernel_size, core.dilation, core.grid)
        query, key, _ = operands
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key).float() * site.scale_of_operands
        if site.bias is not None:
            scores = scores + site.bias.values.to(scores)
        dropped = (scores.softmax(-1) * ~seen.to(scores.device)).sum(-1)
        return {"dropped_mass": [round(float(mass), 6) for mass in dropped.mean(dim=(0, 2))]}


@register_target
@dataclass(frozen=True)
class DilatedNeighborhood(Neighborhood):
    """Dilated neighborhood attention (Hassani and Shi 2022): every other block spreads its kernel over the whole map.

    ``dilation`` None alternates 1 and the largest that fits, as DiNAT does; a number is used everywhere.
    """

    dilation: int | Pair | None = None  # type: ignore[assignment]
    name = "dilated_neighborhood"

    def __post_init__(self) -> None:
        if self.dilation is None:
            replace(self, dilation=1)
        else:
            super().__post_init__()

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if not isinstance(site.keys, Global):
            raise NotConvertible(
                f"dilation over {site.keys} keys is not defined here; use to='neighborhood' for this site"
            )
        if self.dilation is not None:
            return self._sliding(site, as_pair(self.dilation))
        if index % 2 == 0:
            return self._sliding(site, (1, 1))
        grid = _grid_of(site)
        kernel, _ = self._kernel(site, grid, (1, 1))
        return self._sliding(site, (max(1, grid.height // kernel[0]), max(1, grid.width // kernel[1])))


def _blocks(site: AttentionSite, window: Window) -> Conversion:
    core = WindowAttention(window, site.map_grid, site.scale, site.dropout)
    form = f"{window} is neighborhood attention with stride = kernel = {_text(window.size)}"
    offset = f", offset {_text(window.shift)} and truncated border blocks" if any(window.shift) else ""
    settings = {"kernel_size": window.size, "stride": window.size, "offset": window.shift}
    return Conversion(Exactness.EXACT, form + offset, core, settings, "no roll, no mask; the same keys")


def _grid_of(site: AttentionSite) -> Grid:
    if not isinstance(site.keys, Global | Reduced):
        raise NotConvertible(f"its queries see {site.keys}, which lie on no map of their own; leave it with `keep`")
    if site.grid is None:
        raise NotConvertible("where its tokens lie on the map is not known; leave it with `keep`")
    if site.mask is not None:
        raise NotConvertible("a constant mask acts on its scores; leave it with `keep`")
    return site.grid


def _bias_entries(site: AttentionSite, grid: Grid) -> Tensor | None:
    """Where a dense bias holds its relative table; a bias that is not relative cannot follow a sliding kernel."""
    if site.bias is None:
        return None
    table = None if grid.prefix_tokens else relative_table(site.bias.values, (grid.height, grid.width))
    if table is None:
        raise NotConvertible("its bias is no table of relative positions on the map alone; leave it with `keep`")
    return table[1]


def _require_positive(name: str, value: Any) -> None:
    values = value if isinstance(value, tuple | list) and len(value) == 2 else (value,)
    if any(type(each) is not int for each in values):
        raise ArgumentError(f"{name}: expected an integer or two of them, got {value!r}")
    if min(values) < 1:
        raise ArgumentError(f"{name}: must be at least 1, got {as_pair(value)}")


def _text(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
