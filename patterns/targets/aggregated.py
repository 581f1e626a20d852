"""Aggregated attention (Shi 2024, TransNeXt), by dot products, from global, windowed and reduced attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...cores import AggregatedCore, LocalBranch, MaskedAggregatedCore, OfMap, ReducedAggregatedCore
from ...cores.published import beside_prefix
from ...errors import ArgumentError, Refusal
from ...ir.contract import BetweenProjections, Conversion, Exactness, MapAdapter, Target, Weights
from ...ir.core import AttentionCore
from ...ir.heads import as_pair
from ...ir.sites import AttentionSite, Grid, Reduced, Site, Window
from ...modules.aggregated import AggregatedAttention
from ...modules.cosine_attention import CosineAttention, ScoreOptions
from ..published import adapter_between, attention_map, published_attention, require_unset, width_of
from ..site_geometry import (
    bias_entries,
    grid_of_site,
    relative_bias,
    require_one_of,
    require_positive,
    text_of,
    window_bias_entries,
)

Pair = tuple[int, int]
OFF = float("-inf")


@dataclass(frozen=True)
class Aggregated(Target):
    """One softmax over a token's window and a pooled map, plus learned weights after it.

    Dot products stay dot products: cosine similarity, the paper's, is the most destructive single change there is.
    Query embedding, learnable tokens and their bias start at zero and train.

    Args:
        window_size: side of the local window, odd.
        pool: tokens per side that a pooled cell stands for, or (rows, columns); 1 keeps every key. None is 2, but 1 on
            maps of up to 64 tokens, as the paper's last stage attends fully.
        local_bias: what the window's scores start with; ``-inf`` leaves it out of the softmax. None is 0 where keys are
            pooled, and ``-inf`` where none are lost: over the reduced keys of spatial reduction, which are kept, and at
            ``pool=1``.
        windows: what becomes of Swin's windows: ``"pool"`` gives every token the means of the whole map instead, and
            its window keeps the part of the bias that it reaches; ``"mask"`` keeps them, exactly and at a higher cost,
            as a window of ``2 M - 1`` around every token with a mask and nothing pooled.
        official: take the layer as published for the whole site, with cosine similarity, a learned temperature and
            position bias and its own reducer; of spatial reduction the ratio stays. At ``pool=1`` it is the last
            stage's, without window.
        pool_size: rows and columns of its pooled map, the same for every image, instead of ``pool``; for the layer as
            published alone.
    """

    window_size: int = 3
    pool: int | Pair | None = None
    local_bias: float | None = None
    windows: str = "pool"
    official: bool = False
    pool_size: int | Pair | None = None
    name = "aggregated"

    def __post_init__(self) -> None:
        if type(self.window_size) is not int or self.window_size < 1 or self.window_size % 2 == 0:
            raise ArgumentError(f"window_size: must be odd and at least 1, got {self.window_size!r}")
        if self.pool is not None:
            require_positive("pool", self.pool)
        number = isinstance(self.local_bias, int | float) and not isinstance(self.local_bias, bool)
        if self.local_bias is not None and not (number and self.local_bias < math.inf):
            raise ArgumentError(f"local_bias: expected a number or -inf, got {self.local_bias!r}")
        require_one_of("windows", self.windows, ("pool", "mask"))
        if self.windows == "mask" and (self.pool is not None or self.local_bias is not None):
            raise ArgumentError("windows: 'mask' does not pool and keeps the scores; leave pool and local_bias out")
        require_one_of("official", self.official, (False, True))
        if self.official:
            windows = None if self.windows == "pool" else self.windows
            require_unset({"local_bias": self.local_bias}, "whose window has a learned one")
            require_unset({"windows": windows}, "which pools the whole map")
        self._require_pool_size()

    def _require_pool_size(self) -> None:
        if self.pool_size is None:
            return
        require_positive("pool_size", self.pool_size)
        if not self.official or self.pool is not None:
            raise ArgumentError(
                f"pool_size: {self.pool_size!r} is of the layer as published alone, and instead of pool; give it with "
                "official=True and without pool"
            )

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, AttentionSite)
        if self.official:
            return self._published(site, weights)
        if site.dropout:
            raise Refusal("it applies dropout to attention weights, which this core does not support")
        if isinstance(site.keys, Reduced):
            return self._reduced(site, site.keys)
        if isinstance(site.keys, Window) and self.windows == "mask":
            return self._masked(site, site.keys)
        if isinstance(site.keys, Window):
            grid, window, entries = site.map_grid, site.keys.size, window_bias_entries(site, site.keys)
        else:
            grid = grid_of_site(site)
            window, entries = (grid.height, grid.width), bias_entries(site, grid)
        pool = self._pool(grid)
        keeps_all = pool == (1, 1) and window == (grid.height, grid.width)
        bias = self._bias(OFF if keeps_all else 0.0)
        scale = site.scale if isinstance(site.keys, Window) else site.scale_of_operands
        core: AttentionCore = AggregatedCore(self._local(site, bias), pool, grid, scale, window, entries)
        core = OfMap(core) if isinstance(site.keys, Window) else core
        cells = (max(1, grid.height // pool[0]), max(1, grid.width // pool[1]))
        seen = self.window_size**2 * (bias != OFF) + cells[0] * cells[1] + grid.prefix_tokens
        settings = {"window_size": self.window_size, "pool": pool, "local_bias": bias}
        if keeps_all:
            benefit = "none: every query still sees every key"
            return BetweenProjections(*_kept(bias), core, settings=settings, benefit=benefit)
        why, benefit = self._why(site, grid, cells), f"{seen} of {grid.tokens} keys per query"
        return BetweenProjections(Exactness.PROJECTED, why, core, settings=settings, benefit=benefit)

    def _why(self, site: AttentionSite, grid: Grid, cells: Pair) -> str:
        lost = "" if site.bias is None else "; its bias serves the window alone"
        lost += "; windows='mask' is exact but more expensive" if isinstance(site.keys, Window) else ""
        return (
            f"keys beyond a window of {self.window_size} are means over a pooled {text_of(cells)} map of the {grid} one"
            + lost
        )

    def _masked(self, site: AttentionSite, blocks: Window) -> Conversion:
        """Every token's block inside a window around it; any shift, no padding."""
        grid = site.map_grid
        if not blocks.divides(grid):
            raise Refusal(
                f"its windows of {text_of(blocks.size)} pad the {grid} map, and padded slots count as keys, which no "
                "window of tokens contains",
                "use windows='pool', or to='neighborhood', which keeps them",
            )
        side = 2 * max(blocks.size) - 1
        local = LocalBranch(site.heads, site.head_dim, side, 0.0)
        core = MaskedAggregatedCore(local, blocks, grid, site.scale, window_bias_entries(site, blocks))
        why = f"{blocks} masked inside a window of {side} around every token, nothing pooled"
        settings = {"window_size": side, "pool": None, "local_bias": 0.0, "windows": "mask"}
        benefit = f"none: {side**2} scores a query for {blocks.size[0] * blocks.size[1]} keys"
        return BetweenProjections(Exactness.EXACT, why, core, settings=settings, benefit=benefit)

    def _reduced(self, site: AttentionSite, keys: Reduced) -> Conversion:
        """The source's reducer makes the pooled keys: exact for as long as the window has no part in the softmax."""
        grid_of_site(site)  # or it is refused: the window needs the map
        if site.bias is not None or site.key is None:
            raise Refusal("its reduced keys have a bias or are not a plain projection")
        bias = self._bias(OFF)
        core = ReducedAggregatedCore(self._local(site, bias), site.scale_of_operands)
        settings = {"window_size": self.window_size, "reducer": keys.reducer, "local_bias": bias}
        benefit = "none: the window comes on top of the reduced keys"
        return BetweenProjections(*_kept(bias), core, settings=settings, benefit=benefit)

    def _pool(self, grid: Grid) -> Pair:
        return as_pair(self.pool or (1 if grid.height * grid.width <= 64 else 2))

    def _published(self, site: AttentionSite, weights: Weights) -> Conversion:
        """TransNeXt's layer: that of the stages that pool, or the last one's."""
        pooling = self._pooling(site)
        grid = attention_map(site, takes_prefix=bool(pooling))
        options: ScoreOptions = {"pretrain_size": (grid.height, grid.width), "attn_drop": site.dropout}
        width = width_of(site)
        adapter = adapter_between(site.source, site.result, grid)
        if not pooling:
            full = CosineAttention(width, site.heads, **options)
            made = published_attention(site, full, {"qkv": "qkv", "proj": "o"}, weights)
            lost = "" if site.bias is None else "; its bias has no place"
            return made.conversion(
                Exactness.PROJECTED,
                f"cosine similarity on the {grid} map{lost}",
                settings={"sr_ratio": 1},
                benefit="none",
                adapter=adapter,
            )
        module = AggregatedAttention(
            width, site.heads, window_size=self.window_size, sr_ratio=pooling.get("sr_ratio"),
            pool_size=pooling.get("pool_size"), **options,
        )  # fmt: skip
        made = published_attention(site, module, {"q": "q", "kv": "kv", "proj": "o"}, weights)
        reach = self.window_size // 2 + 1
        if (table := relative_bias(site, (reach, reach))) is not None:
            made.carry("relative_pos_bias_local", table.flatten(1))
        cells = module.key_grid((grid.height, grid.width))
        keys = self.window_size**2 + cells[0] * cells[1]
        return made.conversion(
            Exactness.PROJECTED,
            f"cosine similarity with a window of {self.window_size} and a pooled {text_of(cells)} map",
            settings={"window_size": self.window_size, **pooling},
            benefit=f"{keys} of {grid.tokens} keys per query",
            adapter=MapAdapter.on(beside_prefix, grid) if grid.prefix_tokens else adapter,
        )

    def _pooling(self, site: AttentionSite) -> dict[str, Pair]:
        """Ratio or size of the pooled map: of spatial reduction the site's own. Empty: there is none."""
        keys = site.keys
        grid = site.map_grid if isinstance(keys, Window) else grid_of_site(site)
        if self.pool_size is not None:
            return {"pool_size": as_pair(self.pool_size)}
        if not isinstance(keys, Reduced):
            pool = self._pool(grid)
            return {} if pool == (1, 1) else {"sr_ratio": pool}
        ratio = (max(1, grid.height // keys.height), max(1, grid.width // keys.width))
        divides = (grid.height // ratio[0], grid.width // ratio[1]) == (keys.height, keys.width)
        pooling = (
            {"sr_ratio": ratio}
            if "convolution" in keys.reducer and divides
            else {"pool_size": (keys.height, keys.width)}
        )
        if self.pool is not None and pooling != {"sr_ratio": as_pair(self.pool)}:
            ((name, own),) = pooling.items()
            raise ArgumentError(
                f"pool: {self.pool!r} contradicts official=True at {site.name}, whose {name} of {own} is kept; "
                "leave pool out"
            )
        return pooling

    def _bias(self, default: float) -> float:
        return default if self.local_bias is None else float(self.local_bias)

    def _local(self, site: AttentionSite, bias: float) -> LocalBranch:
        return LocalBranch(site.heads, site.head_dim, self.window_size, bias)


def _kept(bias: float) -> tuple[Exactness, str]:
    if bias == OFF:
        return Exactness.EXACT, "all keys are kept, and the window starts at zero after the softmax"
    if bias <= -15:
        return Exactness.CONTINUOUS, f"all keys are kept, and the window's scores start at {bias:g}"
    return Exactness.PROJECTED, f"the window's scores start at {bias:g} beside keys that are all kept"
