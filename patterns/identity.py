"""``to="identity"``: every site rebuilt from its lifted form with this library's own modules; the function is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..ir import AttentionSite, MlpSite, Site, Window
from ..modules import DenseAttention, WindowAttention
from ..targets import Conversion, Exactness, Target, register_target


@register_target
@dataclass(frozen=True)
class Identity(Target):
    """The same function from our own modules: the test that recognition, rewriting and modules are right."""

    name = "identity"
    kinds = ("attention", "mlp", "stem")

    def convert(self, site: Site, index: int) -> Conversion:
        return Conversion(Exactness.EXACT, "the site rebuilt from its lifted form", identity_core(site))


def identity_core(site: Site) -> nn.Module:
    """A core that computes what the site computes."""
    if not isinstance(site, AttentionSite):
        return _other_core(site)
    if isinstance(site.keys, Window):
        return WindowAttention(site.keys, site.scale, site.dropout)
    return DenseAttention(site.scale_of_operands, site.dropout)


def _other_core(site: Site) -> nn.Module:
    raise NotImplementedError(MlpSite)
