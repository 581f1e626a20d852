"""A lift of groups, of querying tokens or of their places that is wrong must not be certified."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from group_donors import donor, images
from query_donors import query_donor, query_images

from attnrewrite.certify import certify, collect_values
from attnrewrite.certify.certificate import wanted_nodes
from attnrewrite.graph.dataflow import Dataflow
from attnrewrite.graph.values import Values
from attnrewrite.ir.sites import AttentionSite, Grid, Interleaved
from attnrewrite.planning.stages import lifted


@cache
def sites_of(name: str) -> tuple[list[AttentionSite], Dataflow, Values]:
    queries = name in ("cait", "two queries")
    model, batch = (query_donor(name), query_images(name)) if queries else (donor(name), images(name))
    plan = lifted(model, batch)
    flow = plan.flow
    sites = [planned.site for planned in plan.sites]
    wanted = collect_values(flow, wanted_nodes(sites))
    return [site for site in sites if isinstance(site, AttentionSite)], flow, wanted


def passes(name: str, site: AttentionSite) -> bool:
    _, flow, values = sites_of(name)
    with torch.no_grad():
        return certify(site, flow, values).passed


def interleaved(name: str) -> AttentionSite:
    return next(site for site in sites_of(name)[0] if isinstance(site.keys, Interleaved))


@pytest.mark.parametrize("name", ["timm", "torchvision", "views", "regions", "padded", "cait", "two queries"])
def test_what_is_read_right_is_certified(name: str) -> None:
    assert all(passes(name, site) for site in sites_of(name)[0])


@pytest.mark.parametrize(
    ("name", "group", "interval"),
    [
        ("views", (4, 3), (4, 2)),  # transposed
        ("views", (4, 3), (1, 4)),
        ("views", (4, 3), (2, 2)),
        ("timm", (2, 2), (2, 3)),
        ("regions", (2, 3), (4, 4)),  # one region, as if its interval grew with the map
        ("regions", (2, 3), (1, 1)),
        ("torchvision", (4, 4), (1, 1)),
    ],
)
def test_wrong_interval(name: str, group: tuple[int, int], interval: tuple[int, int]) -> None:
    site = interleaved(name)
    assert isinstance(site.keys, Interleaved)
    assert site.keys.group == group
    assert not passes(name, replace(site, keys=Interleaved(group, interval)))


def test_transposed_group() -> None:
    assert not passes("views", replace(interleaved("views"), keys=Interleaved((3, 4), (2, 4))))


@pytest.mark.parametrize("name", ["timm", "views", "padded"])
def test_transposed_grid(name: str) -> None:
    site = interleaved(name)
    assert site.grid is not None
    assert not passes(name, replace(site, grid=Grid(site.grid.width, site.grid.height)))


@pytest.mark.parametrize("name", ["timm", "torchvision", "padded"])
def test_dropped_or_transposed_bias(name: str) -> None:
    site = interleaved(name)
    assert site.bias is not None
    transposed = replace(site.bias, values=site.bias.values.transpose(1, 2))
    assert not passes(name, replace(site, bias=transposed))
    assert not passes(name, replace(site, bias=None))


def test_wrong_places_of_tokens() -> None:
    site = interleaved("torchvision")
    assert site.place is not None
    assert not passes("torchvision", replace(site, place=torch.argsort(site.place).roll(1)))
    assert not passes("torchvision", replace(site, place=None))


@pytest.mark.parametrize("name", ["cait", "two queries"])
def test_wrong_querying_tokens(name: str) -> None:
    site = next(site for site in sites_of(name)[0] if site.queries is not None)
    assert site.queries is not None
    assert not passes(name, replace(site, queries=None))
    assert not passes(name, replace(site, queries=site.queries + 1))
    assert len(site.queries) == 1 or not passes(name, replace(site, queries=site.queries.flip(0)))
