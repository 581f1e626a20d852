"""Every kind of attention and every target: the class it gets, or a refusal with reason and remedy."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from target_donors import donor, images

from attnrewrite.errors import Refusal
from attnrewrite.ir.sites import AttentionSite
from attnrewrite.planning.registry import target_of
from attnrewrite.planning.stages import lifted

E, C, P = "EXACT", "CONTINUOUS", "PROJECTED"
OVER_REDUCED = "one key per token; use reduced_keys='keep' .* or to='aggregated'"
NO_OUTSIDE = "inside the softmax.*; leave it out with keep="
NO_LINES = "not the rows and columns of the tokens; use to='aggregated'"
NO_GROUPS = "one key per token.*; use to='aggregated' or to='neighborhood'"
WINDOWED = "it attends within window.*; use to='neighborhood' or to='long_short_distance'"
NOT_A_SUM = "not a sum over the two axes; use to='manhattan'"
UNDILATED_REDUCED = "dilation is not defined over reduced keys; use to='neighborhood'"
UNDILATED_POOLED = r"dilation is not defined over reduced\(7x7.* keys; use to='neighborhood'"
UNDILATED = "dilation is not defined over window.* keys; use to='neighborhood'"
VITS = ("vit", "vit, registers", "vit, average", "vit, torchvision", "vit, transformers")
SWINS = ("swin", "swin, torchvision", "swin, transformers")
PVTS = ("pvt v2", "pvt v1, twins", "pvt v1, transformers")
KEEP, REFIT = {"reduced_keys": "keep"}, {"reduced_keys": "refit"}

# (donors, target, options): of every attention in order, its class or what its refusal says
CELLS: list[tuple[tuple[str, ...], str, dict[str, Any], list[str]]] = [
    (VITS, "aggregated", {}, [E, E]),
    (VITS, "aggregated", {"pool": 2}, [P, P]),
    (VITS, "aggregated", {"local_bias": -20}, [C, C]),
    (VITS, "aggregated", {"pool": 1, "local_bias": 0}, [P, P]),
    (VITS, "manhattan", {}, [C, C]),
    (VITS, "manhattan", {"decay": 0.9}, [P, P]),
    (VITS, "manhattan", {"placement": "outside"}, [C, C]),
    (VITS, "manhattan_decomposed", {}, [P, P]),
    (VITS, "manhattan_decomposed", {"gate": True}, [C, C]),
    (VITS, "long_short_distance", {}, [E, E]),
    (VITS, "long_short_distance", {"group_size": 3}, [P, P]),
    (VITS, "neighborhood", {}, [E, E]),
    (VITS, "neighborhood", {"kernel_size": 3}, [P, P]),
    (VITS, "dilated_neighborhood", {"kernel_size": 2}, [P, P]),
    (VITS, "dilated_neighborhood", {}, [E, E]),
    (SWINS, "aggregated", {}, [P, P, E, E]),
    (SWINS, "aggregated", {"local_bias": -20}, [P, P, C, C]),
    (SWINS, "aggregated", {"windows": "mask"}, [E, E, E, E]),
    (("swin, padded",), "aggregated", {"windows": "mask"}, ["padded slots count as keys.*; use windows='pool'"] * 4),
    (SWINS, "manhattan", {}, [WINDOWED, WINDOWED, C, C]),
    (SWINS, "manhattan_decomposed", {}, [WINDOWED, WINDOWED, NOT_A_SUM, NOT_A_SUM]),
    (SWINS, "long_short_distance", {}, [E, E, E, E]),
    (SWINS, "long_short_distance", {"shifted": "long"}, [E, P, E, E]),
    (SWINS, "long_short_distance", {"group_size": 3}, ["learned for windows of 4; leave group_size out"] * 4),
    (SWINS, "neighborhood", {}, [E, E, E, E]),
    (SWINS, "neighborhood", {"kernel_size": 4}, [P, P, E, E]),
    (SWINS, "neighborhood", {"kernel_size": 3}, [P, P, P, P]),
    (SWINS, "neighborhood", {"dilation": 2}, [P, P, P, P]),
    (SWINS, "dilated_neighborhood", {}, [UNDILATED] * 4),
    (("swin, padded",), "long_short_distance", {}, [E, E, E, E]),
    (("swin, padded",), "neighborhood", {"kernel_size": 7}, [P, P, P, P]),
    (("swin, padded",), "manhattan", {}, [WINDOWED] * 4),
    (("pvt v2", "pvt v2, linear", "pvt v1, twins", "pvt v1, transformers"), "aggregated", {}, [E, E, E, E]),
    (("pvt v2", "pvt v2, linear"), "aggregated", {"local_bias": -20}, [C, C, C, C]),
    (("pvt v2", "pvt v2, linear"), "aggregated", {"local_bias": 0}, [P, P, P, P]),
    (("pvt v2", "pvt v1, twins"), "manhattan", {}, [OVER_REDUCED] * 3 + [C]),
    (("pvt v2, linear",), "manhattan", {}, [OVER_REDUCED] * 4),
    (("pvt v2", "pvt v2, linear", "pvt v1, twins"), "manhattan", KEEP, [C, C, C, C]),
    (("pvt v2, linear",), "manhattan", KEEP | {"placement": "outside"}, [NO_OUTSIDE] * 4),
    (("pvt v2", "pvt v1, twins"), "manhattan_decomposed", {}, [NO_LINES] * 3 + [P]),
    (("pvt v2, linear",), "manhattan_decomposed", {}, [NO_LINES] * 4),
    (("pvt v2", "pvt v1, twins"), "long_short_distance", {}, [NO_GROUPS] * 3 + [E]),
    (("pvt v2, linear",), "long_short_distance", {}, [NO_GROUPS] * 4),
    (("pvt v2", "pvt v2, linear", "pvt v1, twins"), "neighborhood", {}, [E, E, E, E]),
    (("pvt v2", "pvt v1, twins"), "neighborhood", {"kernel_size": (1, 2)}, [P, P, P, P]),
    (("pvt v2", "pvt v1, twins"), "neighborhood", {"dilation": 2}, [UNDILATED_REDUCED] * 3 + [P]),
    (("pvt v2, linear",), "dilated_neighborhood", {}, [UNDILATED_POOLED] * 4),
    (("pvt v2", "pvt v1, twins", "pvt v1, transformers"), "neighborhood", {"kernel_size": 1} | REFIT, [P, P, P, P]),
    (("pvt v2", "pvt v1, twins", "pvt v1, transformers"), "long_short_distance", REFIT, [P, P, P, E]),
    (("pvt v2", "pvt v1, twins", "pvt v1, transformers"), "manhattan", REFIT, [P, P, P, C]),
    (("pvt v2, linear",), "manhattan", REFIT, [P, P, P, P]),
]


@cache
def sites_of(name: str) -> tuple[list[AttentionSite], Any]:
    made = lifted(donor(name), images(name))
    flow = made.flow
    return [planned.site for planned in made.sites if isinstance(planned.site, AttentionSite)], flow.weights


def fate(site: AttentionSite, index: int, weights: Any, target: str, options: dict[str, Any]) -> str:
    try:
        return target_of(target, options).convert(site, index, weights).exactness.name
    except Refusal as reason:
        return reason.told(site.name)


@pytest.mark.parametrize(
    ("name", "target", "options", "expected"),
    [(name, *rest) for names, *rest in CELLS for name in names],
    ids=lambda value: str(value) if isinstance(value, str | dict) else "",
)
def test_every_cell_has_its_class_or_a_refusal_that_helps(
    name: str, target: str, options: dict[str, Any], expected: list[str]
) -> None:
    sites, weights = sites_of(name)
    found = [fate(site, index, weights, target, options) for index, site in enumerate(sites)]
    assert len(found) == len(expected)
    for fact, wanted in zip(found, expected, strict=True):
        assert re.search(f"^{wanted}$" if wanted in (E, C, P) else wanted, fact), f"{fact!r} is not {wanted!r}"
