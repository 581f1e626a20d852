"""CrossFormer's long-short distance attention (Wang et al. 2022), from global, windowed and reduced attention."""

from __future__ import annotations

from dataclasses import dataclass

from ...cores import GroupedCore, InterleavedAttention, OfMap, WindowAttention
from ...cores.grouped import fitted
from ...errors import Refusal
from ...ir.contract import BetweenProjections, Conversion, Exactness, Target, Weights
from ...ir.heads import as_pair
from ...ir.sites import AttentionSite, Grid, Interleaved, Reduced, Site, Window
from ...modules.long_short_distance import LongShortDistanceAttention
from ..pixel_keys import fitted_to_reduced, on_pixels
from ..published import (
    adapter_between,
    attention_map,
    note_of_keys,
    published_attention,
    require_no_dropout,
    require_one_number,
    require_unset,
    width_of,
)
from ..site_geometry import bias_entries, grid_of_site, require_one_of, require_positive, text_of

Pair = tuple[int, int]


@dataclass(frozen=True)
class LongShortDistance(Target):
    """Attention inside groups of neighboring tokens (short), and of tokens an interval apart (long), by turns.

    Args:
        group_size: tokens of a group, per axis or for both. None is the window of a windowed site, and 7 elsewhere.
        interval: of the long distance groups; None is the largest with which one region covers the map, as in the
            paper: ``ceil(side / group_size)``.
        shifted: what becomes of shifted windows: ``"keep"`` the offset, exactly, or ``"long"`` distance instead. None
            is ``"keep"``, and ``"long"`` where ``official``.
        reduced_keys: for spatial reduction, ``"refuse"``, or ``"refit"`` keys and values of every token to the reduced
            ones on the example input; then the reducer is dropped.
        official: take the layer as published, ``pos``, ``qkv``, ``proj``, for the whole site; its dynamic position bias
            is new.
    """

    group_size: int | Pair | None = None
    interval: int | Pair | None = None
    shifted: str | None = None
    reduced_keys: str = "refuse"
    official: bool = False
    name = "long_short_distance"

    def __post_init__(self) -> None:
        for argument, value in (("group_size", self.group_size), ("interval", self.interval)):
            if value is not None:
                require_positive(argument, value)
        require_one_of("official", self.official, (False, True))
        if self.official:
            require_one_number("interval", self.interval)
            require_unset({"shifted": None if self.shifted == "long" else self.shifted}, "whose groups have no offset")
            refit = None if self.reduced_keys == "refuse" else self.reduced_keys
            require_unset({"reduced_keys": refit}, "which takes the reducer's maps for every token's")
        if self.shifted is None:
            object.__setattr__(self, "shifted", "long" if self.official else "keep")
        require_one_of("shifted", self.shifted, ("keep", "long"))
        require_one_of("reduced_keys", self.reduced_keys, ("refuse", "refit"))

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if self.official:
            return self._published(site, index, weights)
        if isinstance(site.keys, Window):
            return self._windowed(site, site.keys)
        if isinstance(site.keys, Interleaved):
            return self._interleaved(site, site.keys)
        if isinstance(site.keys, Reduced) and self.reduced_keys == "refit":
            return on_pixels(site, lambda pixels: self.convert(pixels, index, weights), weights)
        if isinstance(site.keys, Reduced):
            raise Refusal(
                "it attends to reduced keys, and groups need one key per token",
                "use to='aggregated' or to='neighborhood', which keep its keys, or reduced_keys='refit', which fits "
                "one key per token to them",
            )
        grid = grid_of_site(site)
        bias_entries(site, grid)
        if site.bias is not None:
            raise Refusal("its bias is learned for the whole map", "use to='neighborhood', which keeps it")
        group, interval = self._groups(grid, as_pair(self.group_size or 7), index % 2 == 1)
        core = GroupedCore(group, interval, grid, site.scale_of_operands, site.dropout)
        settings = {"group_size": group, "interval": interval}
        if group == (grid.height, grid.width):
            return BetweenProjections(
                Exactness.EXACT,
                f"one group takes the whole {grid} map",
                core,
                settings=settings,
                benefit="none at this size: every query still sees every key",
            )
        why, benefit = _why(group, interval), _benefit(group, grid)
        return BetweenProjections(Exactness.PROJECTED, why, core, settings=settings, benefit=benefit)

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        return fitted_to_reduced(conversion, site, values)

    def _windowed(self, site: AttentionSite, window: Window) -> Conversion:
        size = window.size
        if self.group_size is not None and as_pair(self.group_size) != size:
            raise Refusal(f"its bias is learned for windows of {text_of(size)}", "leave group_size out")
        grid = site.map_grid
        if not any(window.shift) or self.shifted == "keep":
            core = WindowAttention(window, grid, site.scale, site.dropout)
            offset = f" with origin {text_of(window.shift)}" if any(window.shift) else ""
            settings = {"group_size": size, "interval": (1, 1), "shift": window.shift, "bias": "table"}
            why = f"{window} is short distance attention{offset}"
            return BetweenProjections(Exactness.EXACT, why, core, settings=settings, benefit="the same keys")
        group, interval = self._groups(grid, size, long=True)
        if group != size:
            raise Refusal("its windows are larger than the map", "use shifted='keep'")
        grouped = OfMap(GroupedCore(group, interval, grid, site.scale, site.dropout))
        settings = {"group_size": group, "interval": interval, "bias": "table"}
        why = _why(group, interval)
        return BetweenProjections(Exactness.PROJECTED, why, grouped, settings=settings, benefit="as many keys")

    def _interleaved(self, site: AttentionSite, groups: Interleaved) -> Conversion:
        for argument, wanted, own in (
            ("group_size", self.group_size, groups.group), ("interval", self.interval, groups.interval)
        ):  # fmt: skip
            if wanted is not None and as_pair(wanted) != own:
                raise Refusal(
                    f"it already attends within {groups} groups",
                    f"leave {argument} out, or exclude the site",
                )
        core = InterleavedAttention(groups, site.map_grid, site.scale, site.dropout)
        settings = {"group_size": groups.group, "interval": groups.interval, "bias": "table"}
        why = f"{groups} is long distance attention"
        return BetweenProjections(Exactness.EXACT, why, core, settings=settings, benefit="the same keys")

    def _published(self, site: AttentionSite, index: int, weights: Weights) -> Conversion:
        """CrossFormer's layer: short distance for windows and every other site, long distance for the rest."""
        require_no_dropout(site.dropout)
        grid, window, width = attention_map(site), site.keys, width_of(site)
        if width < 32:  # a layer norm over one channel is constant
            raise Refusal(
                f"the published position bias has a 16th of {width} channels, but needs at least two",
                "leave official out",
            )
        configured = as_pair(self.group_size or (window.size if isinstance(window, Window) else 7))
        long = any(window.shift) if isinstance(window, Window) else index % 2 == 1
        steps = (as_pair(self.interval)[0] if self.interval is not None else "adaptive") if long else None
        module = LongShortDistanceAttention(width, site.heads, configured, steps)
        made = published_attention(site, module, {"qkv": "qkv", "proj": "o"}, weights)
        group, interval = module.groups(grid.height, grid.width)
        lost = "; its bias is not taken over" if site.bias is not None else ""
        return made.conversion(
            Exactness.PROJECTED,
            f"{_why(group, interval)}{lost}{note_of_keys(site)}",
            settings={"group_size": configured, "interval": interval},
            benefit=_benefit(group, grid),
            adapter=adapter_between(site.source, site.result, grid),
        )

    def _groups(self, grid: Grid, group: Pair, long: bool) -> tuple[Pair, Pair]:
        sides = (grid.height, grid.width)
        widest = (-(-sides[0] // group[0]), -(-sides[1] // group[1]))
        interval = as_pair(self.interval) if self.interval is not None else widest
        return fitted(group, interval if long else (1, 1), grid)


def _why(group: Pair, interval: Pair) -> str:
    if interval == (1, 1):
        return f"keys outside groups of {text_of(group)} neighbors are dropped"
    return f"only keys in groups of {text_of(group)}, {text_of(interval)} apart, are kept"


def _benefit(group: Pair, grid: Grid) -> str:
    return f"{group[0] * group[1] + grid.prefix_tokens} of {grid.tokens} keys per query"
