"""Models with nothing trivial in them, lifted, and what the certification of their sites needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from attnrewrite.certify import certify, collect_values
from attnrewrite.certify.certificate import Certificate, wanted_nodes
from attnrewrite.graph.dataflow import Dataflow
from attnrewrite.ir.sites import AttentionSite, Site
from attnrewrite.planning.stages import lifted


class Lifted:
    """A model's sites with what their certification needs."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        plan = lifted(model.eval(), example)
        self.flow = plan.flow
        self.sites: list[Site] = [planned.site for planned in plan.sites]
        self.values = collect_values(self.flow, wanted_nodes(self.sites))

    def first(self, kind: type, condition: Callable[[Site], bool] = lambda site: True) -> Site:
        return next(site for site in self.sites if isinstance(site, kind) and condition(site))

    @property
    def attention(self) -> AttentionSite:
        site = self.first(AttentionSite)
        assert isinstance(site, AttentionSite)
        return site

    def certificate(self, site: Site, flow: Dataflow | None = None) -> Certificate:
        with torch.no_grad():
            return certify(site, flow or self.flow, self.values)
