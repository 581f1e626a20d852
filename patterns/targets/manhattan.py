"""Manhattan self-attention, full and decomposed (Fan et al. 2024, RMT), from global and reduced attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...cores import DecomposedManhattanCore, ManhattanCore, OfMap, ReducedManhattanCore
from ...errors import ArgumentError, Refusal
from ...ir.contract import BetweenProjections, Conversion, Exactness, Target, Weights
from ...ir.core import AttentionCore
from ...ir.sites import AttentionSite, Grid, Reduced, Site, Window
from ...modules.decay import log_decay
from ...modules.manhattan import ManhattanAttention
from ...operators.manhattan_attention import PLACEMENTS
from ..pixel_keys import fitted_to_reduced, on_pixels
from ..published import (
    adapter_between,
    attention_map,
    note_of_keys,
    published_attention,
    require_no_dropout,
    require_unset,
    width_of,
)
from ..site_geometry import bias_entries, grid_of_site, is_whole_map, require_one_of

OFFICIAL = (2.0, 4.0)
"""Initial decay and range of RMT's first stages; later stages use (2, 6)."""


@dataclass(frozen=True)
class Manhattan(Target):
    """Attention that decays with Manhattan distance, plus local context enhancement (a 5 x 5 convolution of values).

    Args:
        decay: of every head, a step: None is 1, which keeps the function; a number for all heads; ``"official"`` is
            RMT's, ``1 - 2 ** -(2 + 4 n / heads)`` for head ``n``.
        placement: of the decay, ``"inside"`` the softmax (all released code) or ``"outside"`` (the paper's equation).
        lce: whether there is a local context enhancement; it starts at zero.
        reduced_keys: for spatial reduction, ``"refuse"``, or ``"keep"`` the reduced keys and decay towards the centers
            of their cells, or ``"refit"`` keys and values of every token to them on the example input; then the reducer
            is dropped.
        official: take the layer as published, ``q_proj``, ``k_proj``, ``v_proj``, ``lepe``, ``out_proj``, for the whole
            site, with RMT's decay and rotary position.
    """

    decay: float | str | None = None
    placement: str = "inside"
    lce: bool = True
    reduced_keys: str = "refuse"
    official: bool = False
    name = "manhattan"

    def __post_init__(self) -> None:
        _require_decay(self.decay)
        require_one_of("placement", self.placement, PLACEMENTS)
        require_one_of("reduced_keys", self.reduced_keys, ("refuse", "keep", "refit"))
        kept = None if self.reduced_keys == "refuse" else self.reduced_keys
        _require_official(self.official, self.decay, self.lce, reduced_keys=kept)

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if self.official:
            return _published(site, weights, decomposed=False, placement=self.placement)
        if isinstance(site.keys, Reduced):
            if self.reduced_keys == "refit":
                return on_pixels(site, lambda pixels: self.convert(pixels, index, weights), weights)
            return self._reduced(site, site.keys)
        grid = map_of(site, "decay would spread it over the whole map")
        decay = head_decay(self.decay, site.heads)
        scale = site.scale if isinstance(site.keys, Window) else site.scale_of_operands
        core: AttentionCore = ManhattanCore(
            decay, grid, _channels(site, self.lce), scale, site.dropout, self.placement, self.lce
        )
        core = OfMap(core) if isinstance(site.keys, Window) else core
        return BetweenProjections(
            *self._class(grid, self.lce),
            core,
            settings=self._settings(),
            benefit="none yet: every query still sees every key",
        )

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        return fitted_to_reduced(conversion, site, values)

    def _reduced(self, site: AttentionSite, keys: Reduced) -> Conversion:
        if self.reduced_keys == "refuse":
            raise Refusal(
                f"it attends to {keys.height}x{keys.width} reduced keys, and decay needs one key per token",
                "use reduced_keys='keep' (the same keys, decayed by distance to their cells), reduced_keys='refit' "
                "(one "
                "key per token, fitted on images), or to='aggregated'",
            )
        if self.placement == "outside" or site.bias is not None:
            raise Refusal("with reduced keys the decay acts inside the softmax, which leaves no room for its bias")
        grid, reduced = grid_of_site(site), keys.grid
        decay = head_decay(self.decay, site.heads)
        core = ReducedManhattanCore(decay, grid, reduced, site.scale_of_operands, site.dropout)
        settings = self._settings() | {"lce": False}  # values of the reduced map are no context of a token
        return BetweenProjections(
            *self._class(grid, False), core, settings=settings, benefit="the reduced keys' cost is kept"
        )

    def _class(self, grid: Grid, lce: bool) -> tuple[Exactness, str]:
        if self.decay is None:
            extra = " and local context enhancement 0" if lce else ""
            return Exactness.CONTINUOUS, f"decay 1{extra} keep the function on the {grid} map"
        return Exactness.PROJECTED, f"attention decays by {self.decay} a step on the {grid} map"

    def _settings(self) -> dict[str, object]:
        return {"decay": self.decay, "placement": self.placement, "lce": self.lce}


@dataclass(frozen=True)
class DecomposedManhattan(Target):
    """Manhattan attention along rows, then along columns: cheaper; no decay value reproduces dense attention.

    Args:
        decay: as for ``Manhattan``.
        gate: blend with the dense attention, starting as that alone; trains towards the decomposed form. It costs both.
        lce, official: as for ``Manhattan``.
    """

    decay: float | str | None = None
    gate: bool = False
    lce: bool = True
    official: bool = False
    name = "manhattan_decomposed"

    def __post_init__(self) -> None:
        _require_decay(self.decay)
        _require_official(self.official, self.decay, self.lce, gate=self.gate or None)

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if self.official:
            return _published(site, weights, decomposed=True)
        if isinstance(site.keys, Reduced):
            raise Refusal(
                "it attends to reduced keys, which are not the rows and columns of the tokens",
                "use to='aggregated'",
            )
        grid = map_of(site, "the rows and columns of the map are longer than its windows")
        if site.bias is not None:
            raise Refusal("its bias is not a sum over the two axes", "use to='manhattan', which keeps it")
        if site.dropout:
            raise Refusal(
                "it applies dropout to attention weights, which attention in two passes does not support",
                "use to='manhattan'",
            )
        decay = head_decay(self.decay, site.heads)
        channels = _channels(site, self.lce)
        scale = site.scale if isinstance(site.keys, Window) else site.scale_of_operands
        opening = 0.0 if self.gate else None
        core: AttentionCore = DecomposedManhattanCore(decay, grid, channels, scale, opening, self.lce)
        core = OfMap(core) if isinstance(site.keys, Window) else core
        settings = {"decay": self.decay, "gate": self.gate, "lce": self.lce}
        if self.gate:
            return BetweenProjections(
                Exactness.CONTINUOUS,
                "a gate of 0 keeps the dense attention",
                core,
                settings=settings,
                benefit="none until the gate is 1",
            )
        return BetweenProjections(
            Exactness.PROJECTED,
            f"attention along rows, then columns, of the {grid} map",
            core,
            settings=settings,
            benefit=f"{grid.height + grid.width} of {grid.height * grid.width} products a query",
        )


def map_of(site: AttentionSite, trouble: str) -> Grid:
    """The map of a site whose queries see all of it.

    Raises:
        Refusal: they do not; ``trouble`` says what it would come to.
    """
    if not isinstance(site.keys, Window):
        grid = grid_of_site(site)
        bias_entries(site, grid)
        return grid
    if not is_whole_map(site):
        raise Refusal(
            f"it attends within {site.keys}, and {trouble}",
            "use to='neighborhood' or to='long_short_distance'",
        )
    return site.map_grid


def head_decay(decay: float | str | None, heads: int) -> tuple[float, ...]:
    """Natural logarithm of each head's decay a step."""
    if decay == "official":
        return tuple(log_decay(heads, *OFFICIAL, torch.float64).tolist())
    return (0.0 if decay is None else math.log(float(decay)),) * heads


def _channels(site: AttentionSite, lce: bool) -> int:
    """Of all heads' values together."""
    if site.value is not None:
        return site.value.heads * site.value.head_dim
    if lce:
        raise Refusal("its values are not a plain projection of tokens", "use lce=False")
    return 0


def _published(site: AttentionSite, weights: Weights, decomposed: bool, placement: str = "inside") -> Conversion:
    """RMT's layer; its local context enhancement starts at zero, its decay and rotation as they are."""
    require_no_dropout(site.dropout)
    grid = attention_map(site)
    if isinstance(site.keys, Window):
        map_of(site, "decay would spread it over the whole map")
    if site.head_dim % 2:
        raise Refusal(
            f"rotary position embedding needs an even head_dim, and its heads have {site.head_dim}",
            "leave official out",
        )
    module = ManhattanAttention(width_of(site), site.heads, decomposed, *OFFICIAL, decay_placement=placement)
    layers = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
    made = published_attention(site, module, layers, weights)
    for name in ("lepe.conv.weight", "lepe.conv.bias"):
        made.settle(name)
    form = f"attention along rows, then columns, of the {grid} map" if decomposed else f"decay on the {grid} map"
    lost = "" if site.bias is None else "; its bias has no place"
    keys = grid.height + grid.width if decomposed else grid.tokens
    return made.conversion(
        Exactness.PROJECTED,
        f"{form}, and rotary position{lost}{note_of_keys(site)}",
        settings={"decay": "official", "rotary": "raster", "placement": placement},
        benefit=f"{keys} products a query",
        adapter=adapter_between(site.source, site.result, grid),
    )


def _require_official(official: bool, decay: float | str | None, lce: bool, **others: Any) -> None:
    require_one_of("official", official, (False, True))
    if official:
        decay, without = None if decay == "official" else decay, None if lce else lce
        require_unset({"decay": decay, "lce": without, **others}, "which has the published layer's own")


def _require_decay(decay: float | str | None) -> None:
    if decay is None or decay == "official":
        return
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0.0 < decay <= 1.0:
        raise ArgumentError(f"decay: expected None, 'official' or a number in (0, 1], got {decay!r}")
