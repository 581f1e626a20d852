"""Attention inside groups of tokens: the windows of a map, or its interleaved groups."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from ...errors import Refusal
from ...graph.dataflow import Dataflow
from ...graph.values import input_of, needed_nodes, operator_name, shape_of
from ...ir.sites import AttentionSite, Bias, Grid
from ...lift.grid import token_grids
from ...lift.mixture import Core
from ...lift.projections import Grouping, Projected, projection
from ...lift.query_key_norm import require_scales_of_heads
from ...lift.scores import excluded
from ...lift.source_map import map_on_the_way
from ..relative_table import relative_table
from .added_scores import dropout_rate
from .attention_parts import attention_nodes, head_groups_of, path_of
from .map_groups import groups_of_map
from .output_projection import output_projection


def windowed_site(
    core: Core,
    flow: Dataflow,
    parts: tuple[Projected, Projected, Projected],
    grouped: Grouping,
    bias: Bias | None,
    mask: Tensor | None,
) -> AttentionSite:
    """Several groups of tokens: they must be the windows of a map, and come back to it after the projection."""
    query, key, value = parts
    source, grid = _map_of(query, flow)
    out_proj = output_projection(core, query, shape_of(source)[:-1], None, grouped, flow)
    if out_proj is None or key.source is not query.source:
        raise Refusal(
            "the result of its grouped attention does not return to the map through a linear map",
            "add an output projection",
        )
    require_scales_of_heads(core, grouped)
    outside = None if mask is None else excluded(mask)
    grid, place, window = groups_of_map(source, grid, grouped, outside, _likely_border(query, flow), flow)
    if mask is not None and bool(mask[~excluded(mask)].any()):
        raise Refusal("its windows have a constant bias that is not a mask", "make the bias a parameter")
    if bias is not None and (table := relative_table(bias.values, window.size)) is not None:
        bias = replace(bias, kind=bias.kind if bias.kind != "dense" else "table", shape=tuple(table[0].shape[1:]))
    region = [n for n in needed_nodes([out_proj.result], {source: 0}) if n not in flow.constants]
    linears = (query.linear, key.linear, value.linear)
    nodes = attention_nodes(core, head_groups_of(core, *parts), source, source, out_proj, 0, linears, grouped.placement)
    return AttentionSite(
        name=path_of(flow, [*linears, *core.nodes, out_proj.linear]),
        owner=flow.capture.enclosing_call(region),
        heads=len(grouped.group_of_head),
        head_dim=query.channel.shape[1],
        keys=window,
        nodes=nodes,
        scale=core.scale * query.factor * key.factor,
        grid=grid,
        query=projection(query, grouped),
        key=projection(key, grouped),
        value=projection(value, grouped),
        output=out_proj.projection,
        bias=bias,
        learned_scales=core.learned_scales,
        dropout=dropout_rate(core),
        scale_of_operands=core.scale,
        place=place,
    )


def is_one_block(query: Projected, key: Projected, grouped: Grouping, bias: Bias | None, flow: Dataflow) -> bool:
    """A map that is one window, which on a larger map would be one of several: its bias is a table on that map."""
    if bias is None or key.source is not query.source or grouped.batch_axis:
        return False
    found = map_on_the_way(query, flow)
    if found is None or len(grouped.keys[0]) != found[1].tokens:
        return False
    return relative_table(bias.values, (found[1].height, found[1].width)) is not None


def _likely_border(query: Projected, flow: Dataflow) -> tuple[bool, bool]:
    """Whether the map is padded before the projection, and rolled before that: a padding of nothing shows it."""
    path = flow.provenance(input_of(query.linear), stop=lambda node: node is query.source).path
    names = [operator_name(node) for node in path]
    if "aten::pad" not in names:
        return False, False
    rolled = names.index("aten::roll") if "aten::roll" in names else len(names)
    return True, rolled < names.index("aten::pad")


def _map_of(query: Projected, flow: Dataflow) -> tuple[Node, Grid]:
    """The value that holds the map the windows are cut from, and its grid."""
    found = map_on_the_way(query, flow)
    if found is not None:
        return found
    grid = token_grids(flow, [query.source]).get(query.source)
    if grid is None or grid.prefix_tokens:
        raise Refusal(
            "the map that the windows are cut from is unknown", "compute the tokens by a convolution of the image"
        )
    return query.source, grid
