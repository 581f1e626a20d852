"""Whole recipes: every site of a model becomes what the paper's own models have in its place."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from ...errors import NothingToDo
from ...ir.contract import Conversion, Target, Weights
from ...ir.sites import AttentionSite, Global, Interleaved, MapGroups, Site
from ..published import require_unset
from ..site_geometry import require_one_of
from .aggregated import Aggregated
from .conv_glu import ConvGlu
from .cross_scale import CrossScale
from .long_short_distance import LongShortDistance
from .manhattan import DecomposedManhattan, Manhattan
from .neighborhood import DilatedNeighborhood, Neighborhood
from .tokens_to_token import TokensToToken


@dataclass(frozen=True)
class Recipe(Target):
    """A choice of target for every site. Subclasses say which; sites that a paper leaves alone stay.

    Args:
        official: take every layer as published, for the whole of its site.
    """

    official: bool = field(default=False, kw_only=True)
    kinds = ("attention", "mlp", "stem")

    def __post_init__(self) -> None:
        require_one_of("official", self.official, (False, True))

    @abstractmethod
    def choose(self, site: Site) -> Target:
        """Raises:
        NothingToDo: the paper's models have the same there.
        """

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        return self.choose(site).convert(site, index, weights)

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        return self.choose(site).fit(conversion, site, weights, values)


def _as_in_paper(part: str) -> NothingToDo:
    return NothingToDo(f"the paper's models have the same {part}")


@dataclass(frozen=True)
class TransNeXt(Recipe):
    """Aggregated attention, and convolutional gated linear units for MLPs (Shi 2024)."""

    window_size: int = 3
    name = "transnext"

    def choose(self, site: Site) -> Target:
        if site.kind == "stem":
            raise _as_in_paper("stem, a convolution")
        if site.kind == "mlp":
            return ConvGlu(official=self.official)
        return Aggregated(window_size=self.window_size, official=self.official)


@dataclass(frozen=True)
class Rmt(Recipe):
    """Manhattan attention, decomposed on maps of more than ``full_tokens`` tokens (Fan et al. 2024: the early stages).

    Args:
        decay: as for ``manhattan``. With None, and the decomposed form behind a gate, the function is kept.
        full_tokens: the largest map that full attention is used on: 14 x 14, the third stage at 224 pixels.
    """

    decay: float | str | None = None
    full_tokens: int = 196
    name = "rmt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.official:
            decay = None if self.decay == "official" else self.decay
            require_unset({"decay": decay}, "which has the published layer's own")

    def choose(self, site: Site) -> Target:
        if not isinstance(site, AttentionSite):
            raise _as_in_paper("MLPs, and their stem is no conversion of another")
        grid = site.grid
        large = grid is not None and grid.height * grid.width > self.full_tokens
        if self.official:
            return DecomposedManhattan(official=True) if large else Manhattan(official=True)
        if isinstance(site.keys, Global) and large:
            return DecomposedManhattan(decay=self.decay, gate=self.decay is None)
        return Manhattan(decay=self.decay, reduced_keys="keep")


@dataclass(frozen=True)
class CrossFormer(Recipe):
    """Short and long distance attention by turns, and cross-scale embeddings (Wang et al. 2022)."""

    group_size: int | None = None
    name = "crossformer"

    def choose(self, site: Site) -> Target:
        if site.kind == "mlp":
            raise _as_in_paper("MLPs")
        if site.kind == "stem":
            return CrossScale(official=self.official)
        windowed = isinstance(site, AttentionSite) and isinstance(site.keys, MapGroups)
        return LongShortDistance(group_size=None if windowed else self.group_size, official=self.official)


@dataclass(frozen=True)
class Nat(Recipe):
    """Neighborhood attention in every block (Hassani et al. 2023)."""

    kernel_size: int = 7
    name = "nat"

    def choose(self, site: Site) -> Target:
        if site.kind != "attention":
            raise _as_in_paper("MLPs, and their stem is no conversion of another")
        return Neighborhood(kernel_size=self.kernel_size, official=self.official)


@dataclass(frozen=True)
class Dinat(Recipe):
    """Neighborhood attention and dilated neighborhood attention by turns (Hassani and Shi 2022)."""

    kernel_size: int = 7
    name = "dinat"

    def choose(self, site: Site) -> Target:
        if not isinstance(site, AttentionSite):
            raise _as_in_paper("MLPs, and their stem is no conversion of another")
        kind = DilatedNeighborhood if isinstance(site.keys, Global | Interleaved) else Neighborhood
        return kind(kernel_size=self.kernel_size, official=self.official)


@dataclass(frozen=True)
class T2t(Recipe):
    """A Tokens-to-Token stem (Yuan et al. 2021); the blocks behind it are a plain transformer's."""

    mode: str | None = None
    name = "t2t"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stem()

    def choose(self, site: Site) -> Target:
        if site.kind != "stem":
            raise _as_in_paper("blocks")
        return self._stem()

    def _stem(self) -> Target:
        return TokensToToken(mode=self.mode, official=self.official)


__all__ = ["CrossFormer", "Dinat", "Nat", "Recipe", "Rmt", "T2t", "TransNeXt"]
