"""Neighborhood attention, plain and dilated, from global, windowed and spatially reduced attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...cores import NeighborhoodAttention, ReducedNeighborhoodAttention, SlidingAttention, WindowAttention
from ...cores.neighborhood import clamped_kernel, covers
from ...errors import ArgumentError, Refusal
from ...ir.contract import BetweenProjections, Conversion, Exactness, Target, Weights
from ...ir.core import AttentionCore
from ...ir.heads import as_pair
from ...ir.sites import AttentionSite, Global, Grid, Interleaved, Reduced, Site, Window
from ...modules.neighborhood_block import NeighborhoodAttention2d
from .. import published
from .. import site_geometry as geometry
from ..pixel_keys import fitted_to_reduced, on_pixels
from ..site_geometry import text_of

Pair = tuple[int, int]


@dataclass(frozen=True)
class Neighborhood(Target):
    """Neighborhood attention (Hassani et al. 2023).

    Args:
        kernel_size: per axis or for both. None keeps a window's partition, exactly (a stride equal to the kernel size),
            and interleaved groups, as the kernel whose dilation is their interval; it takes 7 elsewhere.
        dilation: spacing of the keys, per axis or for both.
        oversize: ``"clamp"`` cuts a kernel that does not fit a map to the largest that does (at ``dilation``), which
            the report says; on a larger map it is the whole kernel again. ``"error"`` refuses the site.
        reduced_keys: for spatial reduction, ``"keep"`` the reduced keys, or ``"refit"`` keys and values of every token
            to them on the example input; the reducer is dropped.
        official: take the layer as published, ``qkv``, ``rpb``, ``proj``, for the whole site; one number for each of
            ``kernel_size`` and ``dilation``.
    """

    kernel_size: int | Pair | None = None
    dilation: int | Pair = 1
    oversize: str = "clamp"
    reduced_keys: str = "keep"
    official: bool = False
    name = "neighborhood"

    def __post_init__(self) -> None:
        if self.kernel_size is not None:
            geometry.require_positive("kernel_size", self.kernel_size)
        geometry.require_positive("dilation", self.dilation)
        if self.oversize not in ("clamp", "error"):
            raise ArgumentError(f"oversize: expected 'clamp' or 'error', got {self.oversize!r}")
        geometry.require_one_of("official", self.official, (False, True))
        if self.official:
            published.require_one_number("kernel_size", self.kernel_size)
            published.require_one_number("dilation", self.dilation)
            refit = None if self.reduced_keys == "keep" else self.reduced_keys
            published.require_unset({"reduced_keys": refit}, "which takes the reducer's maps for every token's")
        geometry.require_one_of("reduced_keys", self.reduced_keys, ("keep", "refit"))

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if self.official:
            return self._published(site, as_pair(self.dilation)[0], weights)
        if isinstance(site.keys, Window):
            if self.kernel_size is None and as_pair(self.dilation) == (1, 1):
                return _blocks(site, site.keys)
            return self._sliding_windows(site, site.keys, as_pair(self.dilation))
        if isinstance(site.keys, Interleaved):
            steps = as_pair(self.dilation)
            kept = self.kernel_size is None and steps == (1, 1)
            return self._interleaved(site, site.keys, site.keys.interval if kept else steps)
        if isinstance(site.keys, Reduced):
            if self.reduced_keys == "refit":
                return on_pixels(site, lambda pixels: self._sliding(pixels, as_pair(self.dilation)), weights)
            return self._reduced(site, site.keys)
        return self._sliding(site, as_pair(self.dilation))

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        return fitted_to_reduced(conversion, site, values)

    def _sliding(self, site: AttentionSite, dilation: Pair) -> Conversion:
        grid = geometry.grid_of_site(site)
        kernel, clamped = self._kernel(site, grid, dilation)
        entries = geometry.bias_entries(site, grid)
        core = NeighborhoodAttention(self._wanted(), dilation, grid, site.scale_of_operands, site.dropout, entries)
        settings = {"kernel_size": kernel, "dilation": dilation}
        if covers(kernel, dilation, grid):
            return _same_keys(f"kernel {text_of(kernel)} covers the {grid} map{clamped}", core, settings)
        why = f"keys outside kernel {text_of(kernel)} dilation {text_of(dilation)} are dropped{clamped}"
        seen = f"{kernel[0] * kernel[1] + grid.prefix_tokens} of {grid.tokens}"
        return _other_keys(why, core, settings, seen)

    def _sliding_windows(self, site: AttentionSite, window: Window, dilation: Pair) -> Conversion:
        """A kernel that follows the query, in the place of windows; their bias table is read at its offsets."""
        grid = site.map_grid
        kernel, clamped = self._kernel(site, grid, dilation)
        entries = geometry.window_bias_entries(site, window)
        core = SlidingAttention(self._wanted(), dilation, window.size, site.scale, entries)
        settings = {"kernel_size": kernel, "dilation": dilation}
        if covers(kernel, dilation, grid) and window.size == (grid.height, grid.width):
            why = f"the window and kernel {text_of(kernel)} both cover the {grid} map{clamped}"
            return _same_keys(why, core, settings)
        reached = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
        untrained = site.bias is not None and any(r >= size for r, size in zip(reached, window.size, strict=True))
        why = f"{window} becomes a kernel of {text_of(kernel)} around every query{clamped}"
        why += "; offsets beyond the window take the bias of its edge" if untrained else ""
        return _other_keys(why, core, settings, f"{kernel[0] * kernel[1]}")

    def _interleaved(self, site: AttentionSite, groups: Interleaved, dilation: Pair) -> Conversion:
        """A dilated kernel sees tokens of its own residues alone, all of them where it is as long as their group."""
        if site.dropout:
            raise Refusal("it applies dropout to attention weights, which this core does not support")
        if site.bias is not None and dilation != groups.interval:
            raise Refusal(
                f"its bias is learned for tokens {text_of(groups.interval)} apart",
                f"use dilation={groups.interval}, or to='dilated_neighborhood', which derives it",
            )
        grid, group = site.map_grid, groups.group
        kernel, clamped = self._kernel(site, grid, dilation, group)
        entries = geometry.window_bias_entries(site, groups)
        core = SlidingAttention(self._wanted(group), dilation, group, site.scale, entries, table_step=(1, 1))
        settings = {"kernel_size": kernel, "dilation": dilation}
        form = f"kernel {text_of(kernel)} with dilation {text_of(dilation)}"
        if kernel == group and dilation == groups.interval and groups.is_one_region(grid):
            why = f"{groups} on the {grid} map is {form}"
            return BetweenProjections(Exactness.EXACT, why, core, settings=settings, benefit="the same keys")
        untrained = site.bias is not None and any(k > g for k, g in zip(kernel, group, strict=True))
        why = f"{groups} becomes {form} around every query{clamped}"
        why += "; offsets beyond the group take the bias of its edge" if untrained else ""
        return _other_keys(why, core, settings, f"{kernel[0] * kernel[1]}")

    def _reduced(self, site: AttentionSite, keys: Reduced) -> Conversion:
        if as_pair(self.dilation) != (1, 1):
            raise Refusal(
                "dilation is not defined over reduced keys",
                "use to='neighborhood' for this site, or reduced_keys='refit'",
            )
        grid, reduced = geometry.grid_of_site(site), keys.grid
        kernel, clamped = self._kernel(site, reduced, (1, 1))
        core = ReducedNeighborhoodAttention(self._wanted(), grid, reduced, site.scale_of_operands, site.dropout)
        settings = {"kernel_size": kernel, "reduced": str(reduced)}
        if covers(kernel, (1, 1), reduced):
            why = f"kernel {text_of(kernel)} covers the reduced {reduced} map{clamped}"
            return _same_keys(why, core, settings, "reduced key")
        why = f"reduced keys outside kernel {text_of(kernel)} are dropped"
        return _other_keys(why, core, settings, f"{kernel[0] * kernel[1]} of {reduced.tokens}")

    def _published(self, site: AttentionSite, dilation: int, weights: Weights) -> Conversion:
        """NAT's layer; without a bias to take over its table starts at zero."""
        published.require_no_dropout(site.dropout)
        grid, steps = published.attention_map(site), (dilation, dilation)
        size = as_pair(7 if self.kernel_size is None else self.kernel_size)
        kernel, clamped = self._kernel(site, grid, steps)
        module = NeighborhoodAttention2d(published.width_of(site), site.heads, size[0], dilation)
        made = published.published_attention(site, module, {"qkv": "qkv", "proj": "o"}, weights)
        table = geometry.relative_bias(site, size, steps)
        made.settle("rpb") if table is None else made.carry("rpb", table)
        sees_all = covers(kernel, steps, grid) and not isinstance(site.keys, Reduced)
        same = sees_all and (geometry.is_whole_map(site) or not isinstance(site.keys, Window))
        seen = min(kernel[0] * kernel[1], grid.tokens)
        note = published.note_of_keys(site)
        return made.conversion(
            Exactness.CONTINUOUS if same else Exactness.PROJECTED,
            f"keys in kernel {text_of(kernel)} dilation {dilation} of the {grid} map{clamped}{note}",
            settings={"kernel_size": size[0], "dilation": dilation},
            benefit=f"{seen} of {grid.tokens} keys per query",
            adapter=published.adapter_between(site.source, site.result, grid),
        )

    def _wanted(self, default: Pair = (7, 7)) -> Pair:
        """What a core is given: on every map it takes the largest kernel up to this one that the map holds."""
        return default if self.kernel_size is None else as_pair(self.kernel_size)

    def _kernel(self, site: AttentionSite, grid: Grid, dilation: Pair, default: Pair = (7, 7)) -> tuple[Pair, str]:
        wanted = self._wanted(default)
        kernel = clamped_kernel(wanted, dilation, grid)
        if kernel == wanted:
            return kernel, ""
        if self.oversize == "error":
            raise Refusal(
                f"kernel {text_of(wanted)} with dilation {text_of(dilation)} does not fit the {grid} map",
                f"use kernel_size={kernel} or oversize='clamp'",
            )
        return kernel, f" (clamped from {text_of(wanted)})"


@dataclass(frozen=True)
class DilatedNeighborhood(Neighborhood):
    """Dilated neighborhood attention (Hassani and Shi 2022): every other block spreads its kernel over the whole map.

    ``dilation`` None alternates 1 and the largest that fits, as DiNAT does, and is the interval of interleaved groups;
    a number is used everywhere.
    """

    dilation: int | Pair | None = None  # type: ignore[assignment]  # None means alternating here
    name = "dilated_neighborhood"

    def __post_init__(self) -> None:
        if self.dilation is None:
            replace(self, dilation=1)
        else:
            super().__post_init__()

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if isinstance(site.keys, Reduced) and self.reduced_keys == "refit":
            return on_pixels(site, lambda pixels: self.convert(pixels, index, weights), weights)
        if isinstance(site.keys, Interleaved) and not self.official:
            steps = site.keys.interval if self.dilation is None else as_pair(self.dilation)
            return self._interleaved(site, site.keys, steps)
        if not isinstance(site.keys, Global | Interleaved):
            raise Refusal(f"dilation is not defined over {site.keys} keys", "use to='neighborhood' for this site")
        dilation = self._dilation(site, index)
        if self.official:
            return self._published(site, min(dilation), weights)
        return self._sliding(site, dilation)

    def _dilation(self, site: AttentionSite, index: int) -> Pair:
        if self.dilation is not None:
            return as_pair(self.dilation)
        if index % 2 == 0:
            return 1, 1
        grid = geometry.grid_of_site(site)
        kernel, _ = self._kernel(site, grid, (1, 1))
        return max(1, grid.height // kernel[0]), max(1, grid.width // kernel[1])


def _blocks(site: AttentionSite, window: Window) -> Conversion:
    core = WindowAttention(window, site.map_grid, site.scale, site.dropout)
    form = f"{window} is neighborhood attention with stride = kernel = {text_of(window.size)}"
    offset = f", offset {text_of(window.shift)} and truncated border blocks" if any(window.shift) else ""
    settings = {"kernel_size": window.size, "stride": window.size, "offset": window.shift}
    benefit = "no roll, no mask; the same keys"
    return BetweenProjections(Exactness.EXACT, form + offset, core, settings=settings, benefit=benefit)


def _same_keys(why: str, core: AttentionCore, settings: dict[str, Any], key: str = "key") -> Conversion:
    benefit = f"none at this size: every query still sees every {key}"
    return BetweenProjections(Exactness.EXACT, why, core, settings=settings, benefit=benefit)


def _other_keys(why: str, core: AttentionCore, settings: dict[str, Any], seen: str) -> Conversion:
    return BetweenProjections(Exactness.PROJECTED, why, core, settings=settings, benefit=f"{seen} keys per query")
