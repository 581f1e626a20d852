"""Neighborhood attention, plain and dilated, from global, windowed and spatially reduced attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..cores import NeighborhoodAttention, ReducedNeighborhoodAttention, SlidingAttention, WindowAttention
from ..cores.neighborhood import clamped_kernel, covers, neighborhood_mask, reduced_mask
from ..errors import ArgumentError
from ..ir import AttentionSite, Global, Grid, Reduced, Site, Window
from ..layout import as_pair
from ..targets import Conversion, Exactness, NotConvertible, Target, Weights, register_target
from .geometry import bias_entries, dropped_mass, grid_of_site, require_positive, text_of, window_bias_entries

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
            require_positive("kernel_size", self.kernel_size)
        require_positive("dilation", self.dilation)
        if self.oversize not in ("clamp", "error"):
            raise ArgumentError(f"oversize: expected 'clamp' or 'error', got {self.oversize!r}")

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if isinstance(site.keys, Window):
            if self.kernel_size is None and as_pair(self.dilation) == (1, 1):
                return _blocks(site, site.keys)
            return self._sliding_windows(site, site.keys, as_pair(self.dilation))
        if isinstance(site.keys, Reduced):
            return self._reduced(site, site.keys)
        return self._sliding(site, as_pair(self.dilation))

    def _sliding(self, site: AttentionSite, dilation: Pair) -> Conversion:
        grid = grid_of_site(site)
        kernel, clamped = self._kernel(site, grid, dilation)
        entries = bias_entries(site, grid)
        core = NeighborhoodAttention(kernel, dilation, grid, site.scale_of_operands, site.dropout, entries)
        settings = {"kernel_size": kernel, "dilation": dilation}
        if covers(kernel, dilation, grid):
            return Conversion(
                Exactness.EXACT, f"kernel {text_of(kernel)} covers the {grid} map{clamped}", core, settings,
                "none at this size: every query still sees every key",
            )  # fmt: skip
        return Conversion(
            Exactness.PROJECTED,
            f"keys outside kernel {text_of(kernel)} dilation {text_of(dilation)} are dropped{clamped}", core, settings,
            f"{kernel[0] * kernel[1] + grid.prefix_tokens} of {grid.tokens} keys a query",
        )  # fmt: skip

    def _sliding_windows(self, site: AttentionSite, window: Window, dilation: Pair) -> Conversion:
        """A kernel that follows the query, in the place of windows; their bias table is read at its offsets."""
        grid = site.map_grid
        kernel, clamped = self._kernel(site, grid, dilation)
        core = SlidingAttention(kernel, dilation, window.size, site.scale, window_bias_entries(site, window))
        settings = {"kernel_size": kernel, "dilation": dilation}
        if covers(kernel, dilation, grid) and window.size == (grid.height, grid.width):
            return Conversion(
                Exactness.EXACT, f"the window and kernel {text_of(kernel)} both cover the {grid} map{clamped}", core,
                settings, "none at this size: every query still sees every key",
            )  # fmt: skip
        reached = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
        untrained = site.bias is not None and any(r >= size for r, size in zip(reached, window.size, strict=True))
        return Conversion(
            Exactness.PROJECTED,
            f"{window} becomes a kernel of {text_of(kernel)} around every query{clamped}"
            + ("; offsets beyond the window take the bias of its edge" if untrained else ""),
            core, settings, f"{kernel[0] * kernel[1]} keys a query",
        )  # fmt: skip

    def _reduced(self, site: AttentionSite, keys: Reduced) -> Conversion:
        if as_pair(self.dilation) != (1, 1):
            raise NotConvertible("a reduced key map has no dilation; use to='neighborhood' for this site")
        grid, reduced = grid_of_site(site), Grid(keys.height, keys.width)
        kernel, clamped = self._kernel(site, reduced, (1, 1))
        core = ReducedNeighborhoodAttention(kernel, grid, reduced, site.scale_of_operands, site.dropout)
        settings = {"kernel_size": kernel, "reduced": str(reduced)}
        if covers(kernel, (1, 1), reduced):
            return Conversion(
                Exactness.EXACT, f"kernel {text_of(kernel)} covers the reduced {reduced} map{clamped}", core, settings,
                "none at this size: every query still sees every reduced key",
            )  # fmt: skip
        return Conversion(
            Exactness.PROJECTED, f"reduced keys outside kernel {text_of(kernel)} are dropped", core, settings,
            f"{kernel[0] * kernel[1]} of {reduced.tokens} keys a query",
        )  # fmt: skip

    def _kernel(self, site: AttentionSite, grid: Grid, dilation: Pair) -> tuple[Pair, str]:
        wanted = as_pair(7 if self.kernel_size is None else self.kernel_size)
        kernel = clamped_kernel(wanted, dilation, grid)
        if kernel == wanted:
            return kernel, ""
        if self.oversize == "error":
            raise NotConvertible(
                f"kernel {text_of(wanted)} with dilation {text_of(dilation)} does not fit the {grid} map; "
                f"use kernel_size={kernel} or oversize='clamp'"
            )
        return kernel, f" (clamped from {text_of(wanted)})"

    def measure(self, conversion: Conversion, site: Site, operands: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
        """Dropped softmax mass of every head."""
        assert isinstance(site, AttentionSite)
        core = conversion.core
        if isinstance(core, ReducedNeighborhoodAttention):
            return dropped_mass(site, operands, reduced_mask(core.kernel_size, core.grid, core.reduced))
        return dropped_mass(site, operands, neighborhood_mask(core.kernel_size, core.dilation, core.grid))


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
        grid = grid_of_site(site)
        kernel, _ = self._kernel(site, grid, (1, 1))
        return self._sliding(site, (max(1, grid.height // kernel[0]), max(1, grid.width // kernel[1])))


def _blocks(site: AttentionSite, window: Window) -> Conversion:
    core = WindowAttention(window, site.map_grid, site.scale, site.dropout)
    form = f"{window} is neighborhood attention with stride = kernel = {text_of(window.size)}"
    offset = f", offset {text_of(window.shift)} and truncated border blocks" if any(window.shift) else ""
    settings = {"kernel_size": window.size, "stride": window.size, "offset": window.shift}
    return Conversion(Exactness.EXACT, form + offset, core, settings, "no roll, no mask; the same keys")
