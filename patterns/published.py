"""``official=True``: a site replaced whole by the paper's module, under its official names, with the site's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..cores.published import map_to_tokens, on_tokens
from ..errors import ArgumentError, Refusal
from ..graph.values import shape_of
from ..ir.contract import Adapter, Exactness, MapAdapter, Weights, WholeSite
from ..ir.sites import AttentionSite, Grid, Projection, Reduced, Site, Window
from .site_geometry import grid_of_site


class Published:
    """A paper's module on its way into the place of a site.

    What is neither carried nor settled stays as the module initializes it: then the conversion is FRESH.
    """

    def __init__(self, module: nn.Module, like: Tensor) -> None:
        self.module = module.to(like)
        self.parameters = dict(module.named_parameters())
        self.settled: set[str] = set()
        self.carried = 0

    def carry(self, name: str, value: Tensor, count: int | None = None) -> None:
        """Give a parameter the donor's values; ``count`` of them, where not all are."""
        self.settle(name, value)
        self.carried += value.numel() if count is None else count

    def settle(self, name: str, value: Tensor | float = 0.0) -> None:
        """Give a new parameter the values with which it adds nothing to what the donor did."""
        with torch.no_grad():
            self.parameters[name].copy_(torch.as_tensor(value))
        self.settled.add(name)

    def conversion(
        self,
        exactness: Exactness,
        why: str,
        *,
        settings: dict[str, Any],
        benefit: str,
        adapter: Adapter | None,
        until: Node | None = None,
    ) -> WholeSite:
        """Of ``exactness`` if every parameter is settled; the other arguments are as of ``WholeSite``."""
        fresh = list(dict.fromkeys(n.partition(".")[0] for n in self.parameters if n not in self.settled))
        if fresh:
            exactness, why = Exactness.FRESH, f"{why}; untrained: {', '.join(fresh)}"
        return WholeSite(
            exactness,
            f"as published, {why}",
            self.module,
            settings={"official": True, **settings},
            benefit=benefit,
            adapter=adapter,
            until=until,
            carried=self.carried,
        )


def published_attention(
    site: AttentionSite, module: nn.Module, layers: Mapping[str, str], weights: Weights
) -> Published:
    """A module whose linear ``layers`` hold the site's projections: ``q``, ``k``, ``v`` and ``o`` by layer, as in
    ``{"qkv": "qkv", "proj": "o"}``, heads in order.

    The site's own scale of the scores becomes part of the queries, as the module has ``head_dim ** -0.5``.
    """
    assert site.query is not None
    made = Published(module, weights(site.query.weight))
    projections = {"q": site.query, "k": site.key, "v": site.value, "o": site.output}
    for name, parts in layers.items():
        matrices, biases = zip(*(_of_part(part, projections[part], site, weights) for part in parts), strict=True)
        made.carry(f"{name}.weight", torch.cat(matrices))
        made.carry(f"{name}.bias", torch.cat(biases))
    return made


def _of_part(part: str, projection: Projection | None, site: AttentionSite, weights: Weights) -> tuple[Tensor, Tensor]:
    """Weight and bias of one projection, heads in order; no bias is one of zeros."""
    assert projection is not None
    weight, rows = weights(projection.weight).detach(), projection.rows.flatten()
    bias = weight.new_zeros(len(weight)) if projection.bias is None else weights(projection.bias).detach()
    if part == "o":
        return weight[:, rows.to(weight.device)], bias
    factor = site.scale * site.head_dim**0.5 if part == "q" else 1.0
    return weight[rows.to(weight.device)] * factor, bias[rows.to(weight.device)] * factor


def attention_map(site: AttentionSite, takes_prefix: bool = False) -> Grid:
    """The map of an attention site that a paper's module can replace.

    Raises:
        Refusal: it has something that the papers' modules have no place for.
    """
    grid = site.map_grid if isinstance(site.keys, Window) else grid_of_site(site)
    if site.place is not None:
        raise Refusal("its tokens arrive grouped and not as a map", "leave official out")
    nodes, parts = site.nodes, (site.query, site.key, site.value, site.output)
    acting = _acting(site)
    if acting or nodes.source is None or nodes.result is None or any(part is None for part in parts):
        acting = acting or "more than a linear map"
        raise Refusal(
            f"{acting} acts between its projections and its scores, and the published layer has no counterpart",
            "leave official out, which keeps it",
        )
    if nodes.batch_axis:
        raise Refusal("its token axis precedes its batch axis", "leave official out")
    width = shape_of(nodes.source)[-1]
    if any(part is None or part.rows.numel() != width for part in parts) or shape_of(nodes.result)[-1] != width:
        raise Refusal(
            f"its heads are {site.heads}x{site.head_dim} wide and its tokens {width}, but the published layer has one "
            "width for both",
            "leave official out",
        )
    if grid.prefix_tokens and not takes_prefix:
        raise Refusal(
            f"the published layer does not support {grid.prefix_tokens} class or register tokens",
            "leave official out, which keeps them, or use a model that pools its map instead",
        )
    return grid


def _acting(site: AttentionSite) -> str:
    """What acts between the projections and the scores of a site besides a constant scale."""
    if site.query_norm or site.key_norm:
        scale = ", with a learned scale," if site.learned_scales else ""
        return f"an {site.qk} norm of queries and keys{scale}"
    if site.learned_scales:
        return "a learned scale"
    return "" if site.qk == "none" else site.qk


def require_no_dropout(rate: float) -> None:
    """Raises:
    Refusal: the site drops something in training that the paper's module does not.
    """
    if rate:
        raise Refusal(
            "it applies dropout in training where the published layer does not",
            "set its dropout rate to 0, or leave official out",
        )


def width_of(site: AttentionSite) -> int:
    """Channels of its tokens."""
    return shape_of(site.source)[-1]


def adapter_between(source: Node, result: Node, grid: Grid | None) -> Adapter | None:
    """What a module of channels-last maps needs to run from ``source`` to ``result``.

    Raises:
        Refusal: tokens would have to become a map of no known sides.
    """
    before, after = len(shape_of(source)), len(shape_of(result))
    if (before, after) == (4, 4):
        return None
    if (before, after) == (4, 3):
        return Adapter(map_to_tokens)
    if after != 3 or grid is None:
        raise Refusal("its tokens are reshaped to a map on the way", "leave official out")
    return MapAdapter.on(on_tokens, grid)


def note_of_keys(site: Site) -> str:
    """What is said of a site whose keys the paper's module takes from every token instead."""
    if isinstance(site, AttentionSite) and isinstance(site.keys, Reduced):
        return "; its maps of reduced keys are taken for every token's, without the reducer"
    return ""


def require_unset(options: Mapping[str, Any], reason: str) -> None:
    """Refuse options that contradict ``official=True``: those that are not None.

    Raises:
        ArgumentError: naming both.
    """
    for name, value in options.items():
        if value is not None:
            raise ArgumentError(f"{name}: {value!r} contradicts official=True, {reason}; leave one of them out")


def require_one_number(name: str, value: Any) -> None:
    """Raises:
    ArgumentError: two numbers, where the paper's layer has one for both axes.
    """
    if isinstance(value, tuple | list):
        raise ArgumentError(f"{name}: {value!r} contradicts official=True, which uses one number for both axes")


__all__ = [
    "Published", "adapter_between", "attention_map", "note_of_keys", "published_attention", "require_no_dropout",
    "require_one_number", "require_unset", "width_of",
]  # fmt: skip
