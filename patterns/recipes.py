"""Whole recipes: every site of a model becomes what the paper's own models have in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ir import AttentionSite, Global, Interleaved, MapGroups, Site
from ..targets import Conversion, NothingToDo, Target, Weights, register_target, target_of
from .geometry import require_one_of
from .published import require_unset


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

    def choose(self, site: Site) -> Target:
        """Raises:
        NothingToDo: the paper's models have the same there.
        """
        raise NotImplementedError  # every subclass has its own

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        return self.choose(site).convert(site, index, weights)

    def fit(self, conversion: Conversion, site: Site, weights: Weights, values: Weights) -> Conversion:
        return self.choose(site).fit(conversion, site, weights, values)

    def measure(
        self, conversion: Conversion, site: Site, operands: tuple[Tensor, Tensor, Tensor], queries: Tensor
    ) -> dict[str, Any]:
        return self.choose(site).measure(conversion, site, operands, queries)


def _alone(part: str) -> NothingToDo:
    return NothingToDo(f"the paper's models have {part} as it is")


@register_target
@dataclass(frozen=True)
class TransNeXt(Recipe):
    """Aggregated attention, and convolutional gated linear units for MLPs (Shi 2024)."""

    window_size: int = 3
    name = "transnext"

    def choose(self, site: Site) -> Target:
        if site.kind == "stem":
            raise _alone("a convolution for patches")
        if site.kind == "mlp":
            return target_of("conv_glu", {"official": self.official})
        return target_of("aggregated", {"window_size": self.window_size, "official": self.official})


@register_target
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
            raise _alone("such MLPs and stems")
        grid = site.grid
        large = grid is not None and grid.height * grid.width > self.full_tokens
        if self.official:
            return target_of("manhattan_decomposed" if large else "manhattan", {"official": True})
        if isinstance(site.keys, Global) and large:
            return target_of("manhattan_decomposed", {"decay": self.decay, "gate": self.decay is None})
        return target_of("manhattan", {"decay": self.decay, "reduced_keys": "keep"})


@register_target
@dataclass(frozen=True)
class CrossFormer(Recipe):
    """Short and long distance attention by turns, and cross-scale embeddings (Wang et al. 2022)."""

    group_size: int | None = None
    name = "crossformer"

    def choose(self, site: Site) -> Target:
        if site.kind == "mlp":
            raise _alone("such MLPs")
        if site.kind == "stem":
            return target_of("cross_scale", {"official": self.official})
        windowed = isinstance(site, AttentionSite) and isinstance(site.keys, MapGroups)
        options = {} if windowed else {"group_size": self.group_size}
        return target_of("long_short_distance", {"official": self.official, **options})


@register_target
@dataclass(frozen=True)
class Nat(Recipe):
    """Neighborhood attention in every block (Hassani et al. 2023)."""

    kernel_size: int = 7
    name = "nat"

    def choose(self, site: Site) -> Target:
        if site.kind != "attention":
            raise _alone("such MLPs, and the stem is not converted")
        return target_of("neighborhood", {"kernel_size": self.kernel_size, "official": self.official})


@register_target
@dataclass(frozen=True)
class Dinat(Recipe):
    """Neighborhood attention and dilated neighborhood attention by turns (Hassani and Shi 2022)."""

    kernel_size: int = 7
    name = "dinat"

    def choose(self, site: Site) -> Target:
        if not isinstance(site, AttentionSite):
            raise _alone("such MLPs, and the stem is not converted")
        name = "dilated_neighborhood" if isinstance(site.keys, Global | Interleaved) else "neighborhood"
        return target_of(name, {"kernel_size": self.kernel_size, "official": self.official})


@register_target
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
            raise _alone("such blocks")
        return self._stem()

    def _stem(self) -> Target:
        return target_of("tokens_to_token", {"mode": self.mode, "official": self.official})


__all__ = ["CrossFormer", "Dinat", "Nat", "Recipe", "Rmt", "T2t", "TransNeXt"]
