"""``to="identity"``: every site rebuilt from its lifted form with this library's own modules; the function is kept."""

from __future__ import annotations

from dataclasses import dataclass

from ...cores import Activation, DenseAttention, GatherPatches, InterleavedAttention, MapToTokens, WindowAttention
from ...errors import NothingToDo
from ...ir.contract import BesideStem, BetweenLinears, BetweenProjections, Conversion, Exactness, Target, Weights
from ...ir.core import AttentionCore, StageCore
from ...ir.sites import AttentionSite, Interleaved, MlpSite, Site, StemSite, Window
from ..patch_geometry import map_width, patch_geometry


@dataclass(frozen=True)
class Identity(Target):
    """The same function from our own modules: the test that recognition, rewriting and modules are right."""

    name = "identity"
    kinds = ("attention", "mlp", "stem")

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        why = "the site rebuilt from its lifted form"
        if isinstance(site, MlpSite):
            return BetweenLinears(Exactness.EXACT, why, _mlp_cores(site))
        if isinstance(site, StemSite):
            return BesideStem(Exactness.EXACT, why, _stem_core(site))
        return BetweenProjections(Exactness.EXACT, why, _attention_core(site))


def _attention_core(site: AttentionSite) -> AttentionCore:
    if isinstance(site.keys, Window):
        return WindowAttention(site.keys, site.map_grid, site.scale, site.dropout)
    if isinstance(site.keys, Interleaved):
        return InterleavedAttention(site.keys, site.map_grid, site.scale, site.dropout)
    return DenseAttention(site.scale_of_operands, site.dropout)


def _mlp_cores(site: MlpSite) -> list[StageCore | None]:
    """One activation for every stage that has one."""
    return [Activation(stage.name) if stage.kind in ("activation", "gate") else None for stage in site.stages]


def _stem_core(site: StemSite) -> StageCore:
    if site.tokens is None:
        raise NothingToDo("its map is used as a map: the convolution is all there is")
    flat = len(site.tokens.meta["val"].shape) == 3
    if site.patches is None:
        return MapToTokens(flat)
    geometry = patch_geometry(site.patches, site.kernel, map_width(site.source))
    assert geometry is not None, "a merge is recognized by its geometry"
    grid, order = geometry
    return GatherPatches(site.kernel, order, grid, flat)
