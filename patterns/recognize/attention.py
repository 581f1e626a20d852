"""Softmax attention, in any spelling: fused or explicit, any packing of query, key and value, any token layout."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.fx import Node

from ...capture import ModuleCall
from ...errors import UNFORESEEN, Refusal, unforeseen
from ...graph.dataflow import Dataflow
from ...graph.values import input_of, operator_name, shape_of
from ...ir.contract import recognizer
from ...ir.sites import (
    AttentionSite,
    Bias,
    Global,
    KeySet,
    Refused,
    Site,
    Tokens,
)
from ...lift.grid import token_grids
from ...lift.mixture import Core, find_cores
from ...lift.projections import Grouping, Projected, group_sizes, grouping, projected, projection, source_tokens
from ...lift.query_key_norm import kind_of, normalized_parts
from ...lift.token_order import is_reordered
from .added_scores import bias_of_heads, dropout_rate, mask_of_groups, of_groups
from .attention_parts import attention_nodes, head_groups_of, path_of
from .output_projection import follow, output_projection
from .querying_tokens import querying_tokens, require_queries_of_tokens, token_ranks
from .spatial_reduction import reduced_keys
from .unread_queries import why_unread
from .windowed_attention import is_one_block, windowed_site


@recognizer(order=0)
def recognize_attention(flow: Dataflow, found: list[Site]) -> list[Site | Refused]:
    """Every softmax attention of the graph, lifted, or refused with the reason."""
    cores, failed = find_cores(flow)
    refused = [Refused(path_of(flow, [anchor]), "attention", reason) for anchor, reason in failed]
    sites: list[AttentionSite] = []
    for core in cores:
        try:
            sites.append(_lift(core, flow))
        except Refusal as reason:
            refused.append(Refused(path_of(flow, list(core.nodes)), "attention", str(reason)))
        except UNFORESEEN as cause:
            refused.append(Refused(path_of(flow, list(core.nodes)), "attention", unforeseen(cause)))
    return [*(_with_dropout(site, flow) for site in _with_grids(sites, flow)), *refused]


def _lift(core: Core, flow: Dataflow) -> AttentionSite:
    query, key, value = (projected(operand, core, flow) for operand in (core.query, core.key, core.value))
    if query is None or key is None or value is None or key.source is not value.source:
        return _lift_normalized(core, flow) or _lift_live(core, flow)
    grouped = grouping(query, key, value)
    bias, mask = bias_of_heads(core, grouped, flow), mask_of_groups(core, grouped)
    sequences = _sequences((query, key, value)) if bias is None and mask is None else None
    padded = bool((grouped.queries < 0).any() or (grouped.keys < 0).any())
    if grouped.queries.shape[0] > 1 or padded or is_one_block(query, key, grouped, bias, flow):
        try:
            return windowed_site(core, flow, (query, key, value), grouped, bias, mask)
        except Refusal:
            if sequences is None:
                raise
        (query, key, value), grouped = sequences
    queries = querying_tokens(query, grouped)
    out_proj = output_projection(core, query, *token_ranks(query, grouped, queries), grouped, flow)
    if out_proj is None and sequences is not None:
        (query, key, value), grouped = sequences
        queries = querying_tokens(query, grouped)
        out_proj = output_projection(core, query, *token_ranks(query, grouped, queries), grouped, flow)
    keys = _whole_map_keys(query, key, grouped, flow)
    linears = (query.linear, key.linear, value.linear)
    nodes = attention_nodes(
        core, head_groups_of(core, query, key, value), query.source, key.source, out_proj, grouped.batch_axis, linears,
        grouped.placement,
    )  # fmt: skip
    return AttentionSite(
        name=path_of(flow, [*linears, *core.nodes]),
        owner=flow.capture.enclosing_call(list(core.nodes)),
        heads=len(grouped.group_of_head),
        head_dim=query.channel.shape[1],
        keys=keys,
        nodes=nodes,
        scale=core.scale * query.factor * key.factor,
        query=projection(query, grouped),
        key=projection(key, grouped),
        value=projection(value, grouped),
        output=out_proj.projection if out_proj else None,
        bias=bias,
        mask=mask,
        learned_scales=core.learned_scales,
        dropout=dropout_rate(core),
        scale_of_operands=core.scale,
        queries=queries,
    )


def _sequences(parts: tuple[Projected, ...]) -> tuple[tuple[Projected, ...], Grouping] | None:
    """The same operands made of their linear maps' own input, where that is another value and every sample of it is one
    group: the rows or the columns of a map, say, that a model cuts up before it calls its attention."""
    own = tuple(part.of_own_input for part in parts)
    source = own[0].source
    if source is parts[0].source or any(part.source is not source for part in own) or len(shape_of(source)) != 3:
        return None
    try:
        grouped = grouping(*own)
    except Refusal:
        return None
    whole = torch.arange(shape_of(source)[1])
    same = all(torch.equal(tokens, whole[None]) for tokens in (grouped.queries, grouped.keys))
    return (own, grouped) if same and grouped.batch_axis == 0 else None


def _lift_normalized(core: Core, flow: Dataflow) -> AttentionSite | None:
    """Windows of queries and keys whose head vectors are normalized after the projection; None if it is not that."""
    found = normalized_parts(core, flow)
    if found is None:
        return None
    parts, norms = found
    try:
        grouped = grouping(*parts)
    except Refusal:
        return None
    bias, mask = bias_of_heads(core, grouped, flow), mask_of_groups(core, grouped)
    whole = len(grouped.queries) == 1 and not bool((grouped.queries < 0).any())
    if whole and not is_one_block(parts[0], parts[1], grouped, bias, flow):
        return None
    try:
        site = windowed_site(core, flow, parts, grouped, bias, mask)
    except Refusal:
        if whole:  # one that need not be cut stays as it is
            return None
        raise
    return replace(site, qk=kind_of(norms), query_norm=norms[0], key_norm=norms[1])


def _lift_live(core: Core, flow: Dataflow) -> AttentionSite:
    """Something acts on queries or keys after the projection, or keys and values are made of different maps: that
    stays in the graph, and the core alone is the site."""
    require_queries_of_tokens(core, flow)
    operands = (core.query, core.key, core.value)
    above = [node for operand in operands for node in flow.ancestors(operand.node, stop=flow.is_linear)]
    linears = _nearest([node for node in above if flow.is_linear(node)], core, flow)
    sizes, batch = group_sizes(core), shape_of(flow.capture.inputs[0])[0]
    if not linears or math.prod(sizes) % batch:
        raise Refusal("query, key and value are not linear projections", "compute them by linear maps of the tokens")
    source, _ = flow.remembered(source_tokens, input_of(linears[0]))
    queries = shape_of(core.query.node)[core.query.axes.index("x")]
    if queries * batch != math.prod(shape_of(source)[:-1]):
        raise Refusal(why_unread(core, linears[0], above, flow))
    between = [node for node in above if not flow.is_movement(node) and not flow.is_linear(node)]
    acting = {operator_name(node).removeprefix("aten::") for node in between}
    heads = math.prod(sizes) // batch
    out_proj = follow(core.output.node, flow, flow.is_linear)
    following = () if out_proj is None else (out_proj,)
    samples = core.groups[:1] if len(sizes) > 1 and sizes[0] == batch else ""
    head_groups = core.groups.removeprefix(samples)
    first = torch.arange(heads)
    values = None if core.bias is None else of_groups(core.bias, core, first)
    return AttentionSite(
        name=path_of(flow, [*linears, *core.nodes]),
        owner=flow.capture.enclosing_call(list(core.nodes)),
        heads=heads,
        head_dim=shape_of(core.query.node)[core.query.axes.index("d")],
        keys=Global() if _is_global(core, flow) else Tokens(shape_of(core.key.node)[core.key.axes.index("y")]),
        nodes=attention_nodes(core, head_groups, source, None, None, 0, (*linears, *following)),
        scale=core.scale,
        bias=None if values is None else Bias("dense", core.addends, values, tuple(values.shape)),
        mask=None if core.mask is None else of_groups(core.mask, core, first),
        learned_scales=core.learned_scales,
        qk=f"live({', '.join(sorted(acting))})" if acting else "none",
        dropout=dropout_rate(core),
        scale_of_operands=core.scale,
    )


def _nearest(linears: list[Node], core: Core, flow: Dataflow) -> list[Node]:
    """Those in the smallest module call around the core that has any: others are of blocks before."""
    call: ModuleCall | None = flow.capture.enclosing_call(list(core.nodes))
    while call is not None:
        inside = [node for node in linears if call.encloses(flow.capture.position[node])]
        if inside:
            return inside
        call = call.parent
    return linears


def _whole_map_keys(query: Projected, key: Projected, grouped: Grouping, flow: Dataflow) -> KeySet:
    if key.source is not query.source:
        return reduced_keys(key.source, query.source, flow) or Tokens(grouped.keys.shape[1])
    tokens = torch.arange(math.prod(shape_of(query.source)[:-1]) // shape_of(query.source)[grouped.batch_axis])
    if torch.equal(grouped.keys[0], tokens):
        return Global()
    if len(tokens) > 1 and grouped.keys.shape[1] == 1:
        raise Refusal(
            "every query sees a single key: attention runs along an axis of length one",
            "check which axis holds the tokens (batch_first)",
        )
    return Tokens(grouped.keys.shape[1])


def _with_dropout(site: AttentionSite, flow: Dataflow) -> AttentionSite:
    """A rate that eval mode passes as zero is not in the graph, but in the module that mixes the values."""
    if site.dropout:
        return site
    mixing = flow.capture.enclosing_call([site.nodes.output.node])
    return replace(site, dropout=flow.capture.training_dropout(mixing, site.scale))


def _is_global(core: Core, flow: Dataflow) -> bool:
    """As many keys as queries, and neither known to be in another order than their tokens."""
    return _same_length(core) and not any(is_reordered(operand, flow) for operand in (core.query, core.key))


def _same_length(core: Core) -> bool:
    lengths = (
        shape_of(operand.node)[operand.axes.index(axis)] for operand, axis in ((core.query, "x"), (core.key, "y"))
    )
    return len(set(lengths)) == 1


def _with_grids(sites: list[AttentionSite], flow: Dataflow) -> list[AttentionSite]:
    wanted = [site.nodes.source for site in sites if site.grid is None and site.nodes.source is not None]
    grids = token_grids(flow, wanted)
    return [
        replace(site, grid=grids.get(site.nodes.source)) if site.grid is None and site.nodes.source else site
        for site in sites
    ]
