"""The captured values that certification starts from, and those that it compares with."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from ..ir.sites import AttentionSite, Site


def inputs_of(site: Site) -> list[Node]:
    """The values that a site's form is computed from."""
    if not isinstance(site, AttentionSite):
        return [site.source]
    if site.query is None:
        return operands_of(site)
    return list(dict.fromkeys([site.source, site.nodes.key_source or site.source]))


def operands_of(site: AttentionSite) -> list[Node]:
    """Queries, keys and values as they enter the product, each value once."""
    nodes = site.nodes
    return list(dict.fromkeys([nodes.query.node, nodes.key.node, nodes.value.node]))


def compared_of(site: Site) -> list[Node]:
    """The captured values that a site's form must reproduce."""
    if not isinstance(site, AttentionSite):
        return [site.result]
    operands = [] if site.query is None else operands_of(site)
    result = [] if site.nodes.out_proj is None else [site.result]
    return list(dict.fromkeys([*operands, site.nodes.output.node, *result]))


def wanted_nodes(sites: Iterable[Site]) -> set[Node]:
    """The captured values that certification of ``sites`` needs."""
    return {node for site in sites for node in (*inputs_of(site), *compared_of(site))}
