"""Which tokens of a site's result the model's outputs can depend on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node

from ..certify.forms import operand_heads_last
from ..errors import UNFORESEEN
from ..graph.dataflow import Dataflow
from ..graph.liveness import read_elements
from ..graph.values import shape_of
from ..ir.sites import AttentionSite, MapGroups, Site

ALL, PREFIX, NONE = "all", "prefix", "none"
TOLD = {
    ALL: "",
    PREFIX: "   DEAD beyond its prefix tokens: no output reads its map",
    NONE: "   DEAD: no output reads it",
}


def read_tokens(flow: Dataflow, sites: Sequence[Site]) -> list[str]:
    """For every site: ``"all"`` of its tokens, the ``"prefix"`` alone (class, distillation and register tokens) or
    ``"none"`` can reach an output of the captured call. Proved on the graph; without a proof it is ``"all"``."""
    nodes = [_result(site) for site in sites]
    try:
        read = read_elements(flow, nodes)
        return [_tokens(site, read[node]) for site, node in zip(sites, nodes, strict=True)]
    except UNFORESEEN:
        return [ALL] * len(nodes)


def _result(site: Site) -> Node:
    if not isinstance(site, AttentionSite):
        return site.result
    return site.nodes.output.node


def _tokens(site: Site, read: Tensor) -> str:
    if not bool(read.any()):
        return NONE
    if bool(read.all()) or not isinstance(site, AttentionSite) or isinstance(site.keys, MapGroups) or site.grid is None:
        return ALL
    if site.queries is not None:  # then its result has no map beyond the prefix
        return ALL
    nodes = site.nodes
    read = read.expand(shape_of(nodes.output.node))
    rows = operand_heads_last(read, nodes.output, site).any((0, 2, 3))
    beyond = rows[site.grid.prefix_tokens :]
    return ALL if bool(beyond.any()) else PREFIX
