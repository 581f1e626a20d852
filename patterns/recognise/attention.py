"""Softmax attention, in any spelling: fused or explicit, any packing of query, key and value, any token layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from ...capture import ModuleCall, training_dropout
from ...errors import UNFORESEEN, Refusal, unforeseen
from ...graph.contraction import canonical
from ...graph.dataflow import Dataflow
from ...graph.movement import Provenance
from ...graph.values import argument, digest, input_of, needed_nodes, operator_name, shape_of
from ...ir.contract import recogniser
from ...ir.sites import (
    AttentionNodes,
    AttentionSite,
    Bias,
    Global,
    Grid,
    KeySet,
    Placement,
    Projection,
    Refused,
    Site,
    Tokens,
)
from ...lift.grid import token_grids
from ...lift.mixture import Core, find_cores
from ...lift.projections import Grouping, Projected, group_sizes, grouping, projected, projection, source_tokens
from ...lift.query_key_norm import kind_of, normalised_parts, require_scales_of_heads
from ...lift.scores import excluded
from ...lift.source_map import map_on_the_way
from ...lift.token_order import is_reordered
from ..relative_table import relative_table
from .map_groups import groups_of_map
from .querying_tokens import querying_tokens, require_queries_of_tokens, token_ranks
from .spatial_reduction import reduced_keys
from .unread_queries import why_unread


@recogniser(order=0)
def recognise_attention(flow: Dataflow, found: list[Site]) -> list[Site | Refused]:
    """Every softmax attention of the graph, lifted, or refused with the reason."""
    cores, failed = find_cores(flow)
    refused = [Refused(_path(flow, [anchor]), "attention", reason) for anchor, reason in failed]
    sites: list[AttentionSite] = []
    for core in cores:
        try:
            sites.append(_lift(core, flow))
        except Refusal as reason:
            refused.append(Refused(_path(flow, list(core.nodes)), "attention", str(reason)))
        except UNFORESEEN as cause:
            refused.append(Refused(_path(flow, list(core.nodes)), "attention", unforeseen(cause)))
    return [*(_with_dropout(site, flow) for site in _with_grids(sites, flow)), *refused]


def _lift(core: Core, flow: Dataflow) -> AttentionSite:
    query, key, value = (projected(operand, core, flow) for operand in (core.query, core.key, core.value))
    if query is None or key is None or value is None or key.source is not value.source:
        return _lift_normalised(core, flow) or _lift_live(core, flow)
    grouped = grouping(query, key, value)
    bias, mask = _bias(core, grouped, flow), _mask(core, grouped)
    sequences = _sequences((query, key, value)) if bias is None and mask is None else None
    padded = bool((grouped.queries < 0).any() or (grouped.keys < 0).any())
    if grouped.queries.shape[0] > 1 or padded or _is_one_block(query, key, grouped, bias, flow):
        try:
            return _windowed(core, flow, (query, key, value), grouped, bias, mask)
        except Refusal:
            if sequences is None:
                raise
        (query, key, value), grouped = sequences
    queries = querying_tokens(query, grouped)
    merged = _merge(core, query, *token_ranks(query, grouped, queries), grouped, flow)
    if merged is None and sequences is not None:
        (query, key, value), grouped = sequences
        queries = querying_tokens(query, grouped)
        merged = _merge(core, query, *token_ranks(query, grouped, queries), grouped, flow)
    keys = _whole_map_keys(query, key, grouped, flow)
    linears = (query.linear, key.linear, value.linear)
    nodes = _nodes(
        core, _head_groups(core, query, key, value), query.source, key.source, merged, grouped.batch_axis, linears,
        grouped.placement,
    )  # fmt: skip
    return AttentionSite(
        name=_path(flow, [*linears, *core.nodes]),
        owner=flow.capture.enclosing_call(list(core.nodes)),
        heads=len(grouped.group_of_head),
        head_dim=query.channel.shape[1],
        keys=keys,
        nodes=nodes,
        scale=core.scale * query.factor * key.factor,
        query=projection(query, grouped),
        key=projection(key, grouped),
        value=projection(value, grouped),
        output=merged.projection if merged else None,
        bias=bias,
        mask=mask,
        learned_scales=core.learned_scales,
        dropout=_dropout(core),
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


def _windowed(
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
    merged = _merge(core, query, shape_of(source)[:-1], None, grouped, flow)
    if merged is None or key.source is not query.source:
        raise Refusal(
            "grouped attention whose result does not come back to its map through a linear map",
            "give it an output projection",
        )
    require_scales_of_heads(core, grouped)
    outside = None if mask is None else excluded(mask)
    grid, place, window = groups_of_map(source, grid, grouped, outside, _likely_border(query, flow), flow)
    if mask is not None and bool(mask[~excluded(mask)].any()):
        raise Refusal("a constant bias that is not a mask acts inside the windows", "make the bias a parameter")
    if bias is not None and (table := relative_table(bias.values, window.size)) is not None:
        bias = replace(bias, kind=bias.kind if bias.kind != "dense" else "table", shape=tuple(table[0].shape[1:]))
    region = [n for n in needed_nodes([merged.result], {source: 0}) if n not in flow.constants]
    linears = (query.linear, key.linear, value.linear)
    nodes = _nodes(core, _head_groups(core, *parts), source, source, merged, 0, linears, grouped.placement)
    return AttentionSite(
        name=_path(flow, [*linears, *core.nodes, merged.linear]),
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
        output=merged.projection,
        bias=bias,
        learned_scales=core.learned_scales,
        dropout=_dropout(core),
        scale_of_operands=core.scale,
        place=place,
    )


def _lift_normalised(core: Core, flow: Dataflow) -> AttentionSite | None:
    """Windows of queries and keys whose head vectors are normalised after the projection; None if it is not that."""
    found = normalised_parts(core, flow)
    if found is None:
        return None
    parts, norms = found
    try:
        grouped = grouping(*parts)
    except Refusal:
        return None
    bias, mask = _bias(core, grouped, flow), _mask(core, grouped)
    whole = len(grouped.queries) == 1 and not bool((grouped.queries < 0).any())
    if whole and not _is_one_block(parts[0], parts[1], grouped, bias, flow):
        return None
    try:
        site = _windowed(core, flow, parts, grouped, bias, mask)
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
        raise Refusal("query, key and value do not come from linear maps", "project tokens to them by linear maps")
    source, _ = flow.remembered(source_tokens, input_of(linears[0]))
    queries = shape_of(core.query.node)[core.query.axes.index("x")]
    if queries * batch != math.prod(shape_of(source)[:-1]):
        raise Refusal(why_unread(core, linears[0], above, flow))
    between = [node for node in above if not flow.is_movement(node) and not flow.is_linear(node)]
    acting = {operator_name(node).removeprefix("aten::") for node in between}
    heads = math.prod(sizes) // batch
    merged = _follow(core.output.node, flow, flow.is_linear)
    following = () if merged is None else (merged,)
    samples = core.groups[:1] if len(sizes) > 1 and sizes[0] == batch else ""
    head_groups = core.groups.removeprefix(samples)
    first = torch.arange(heads)
    values = None if core.bias is None else _of_groups(core.bias, core, first)
    return AttentionSite(
        name=_path(flow, [*linears, *core.nodes]),
        owner=flow.capture.enclosing_call(list(core.nodes)),
        heads=heads,
        head_dim=shape_of(core.query.node)[core.query.axes.index("d")],
        keys=Global() if _is_global(core, flow) else Tokens(shape_of(core.key.node)[core.key.axes.index("y")]),
        nodes=_nodes(core, head_groups, source, None, None, 0, (*linears, *following)),
        scale=core.scale,
        bias=None if values is None else Bias("dense", core.addends, values, tuple(values.shape)),
        mask=None if core.mask is None else _of_groups(core.mask, core, first),
        learned_scales=core.learned_scales,
        qk=f"live({', '.join(sorted(acting))})" if acting else "none",
        dropout=_dropout(core),
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


@dataclass(frozen=True)
class _Merged:
    """The output projection, and the first value after it whose tokens lie as those of the source."""

    linear: Node
    result: Node
    projection: Projection


def _merge(
    core: Core,
    query: Projected,
    source_shape: tuple[int, ...],
    ranks: Tensor | None,
    grouped: Grouping,
    flow: Dataflow,
) -> _Merged | None:
    """Follow the product with the values through data movement to a linear map and on to the source's token order;
    of querying tokens alone, to the order of their ``ranks``."""
    linear = _follow(core.output.node, flow, flow.is_linear)
    if linear is None:
        return None
    found = flow.provenance(input_of(linear), stop=lambda node: node is core.output.node)
    if found.source is not core.output.node:
        return None
    axes, shape = core.output.axes, shape_of(core.output.node)
    told_by = (digest(query.token), digest(query.channel), digest(grouped.group_of_head))
    key = (_merge, found.spelling, axes, shape, core.groups, *told_by)
    read = flow.once(key, lambda: _tokens_and_columns(core, query, grouped, found))
    if read is None:
        return None
    token, columns = read
    result = _in_source_order(linear, token if ranks is None else ranks[token], source_shape, flow)
    output = Projection(argument(linear, 1), argument(linear, 2), columns)
    return None if result is None else _Merged(linear, result, output)


def _tokens_and_columns(
    core: Core, query: Projected, grouped: Grouping, merged: Provenance
) -> tuple[Tensor, Tensor] | None:
    """The token of every row that goes into the output projection, and ``[heads, dims]`` the column of every channel;
    None if rows mix tokens."""
    if bool((merged.address < 0).any()):
        return None
    extents = dict(zip(core.output.axes, shape_of(core.output.node), strict=True))
    heads, dims = len(grouped.group_of_head), extents["e"]
    width = heads * dims
    head = _heads_of_groups(query, grouped.group_of_head)
    number = (query.token * width)[..., None] + (head * dims)[:, None, None] + torch.arange(dims)
    number = number.view(*(extents[axis] for axis in core.groups), *number.shape[1:])
    number = canonical(number, core.groups + "xe", core.output.axes).flatten()
    number = number[merged.address.reshape(-1, merged.address.shape[-1])]  # token and column of every channel
    token, column = number[:, 0] // width, number[0] % width
    if len(column) != width or not torch.equal(number, (token * width)[:, None] + column):
        return None
    return token, torch.argsort(column).view(heads, dims)


def _heads_of_groups(query: Projected, group_of_head: Tensor) -> Tensor:
    """The head of every flat group, of all samples: heads are told apart by their weight rows."""
    rows = query.channel[group_of_head[:, 0]]
    if len(torch.unique(rows, dim=0)) != len(rows):
        raise Refusal("heads share their queries", "give every head queries of its own")
    return (query.channel[:, None] == rows[None]).all(-1).long().argmax(1)


def _in_source_order(linear: Node, token: Tensor, shape: tuple[int, ...], flow: Dataflow) -> Node | None:
    """The first value at or after ``linear`` whose tokens are the source's, each once and in order.

    One that has the source's ``shape`` is preferred.
    """
    count, told_by = math.prod(shape), digest(token)

    def restored(node: Node) -> bool:
        if node.meta["val"].numel() != count * shape_of(linear)[-1]:
            return False
        found = flow.provenance(node, stop=lambda n: n is linear)
        if found.source is not linear:
            return False
        key = (_in_source_order, found.spelling, count, shape_of(linear)[-1], told_by)
        return flow.once(key, lambda: _is_in_order(found, count, shape_of(linear)[-1], token))

    def restored_map(node: Node) -> bool:
        return shape_of(node)[:-1] == shape and restored(node)

    for wanted in (restored_map, restored):
        result = linear if wanted(linear) else _follow(linear, flow, wanted)
        if result is not None:
            return result
    return None


def _is_in_order(moved: Provenance, count: int, width: int, token: Tensor) -> bool:
    """Whether moved rows, which stand for ``token``s, come to lie as ``count`` tokens, each once and in order."""
    if bool((moved.address < 0).any()):
        return False
    address = moved.address.reshape(count, -1)
    in_order = bool((address == address[:, :1] + torch.arange(address.shape[1])).all())
    return in_order and torch.equal(token[address[:, 0] // width], torch.arange(count))


def _follow(node: Node, flow: Dataflow, reached: Callable[[Node], bool]) -> Node | None:
    """Go forward through single uses and data movement until ``reached``."""
    while True:
        users = [user for user in flow.live_users(node) if user.op == "call_function"]
        for user in users:
            if reached(user):
                return user
        onward = [user for user in users if flow.is_movement(user)]
        if len(onward) != 1:
            return None
        node = onward[0]


def _whole_map_keys(query: Projected, key: Projected, grouped: Grouping, flow: Dataflow) -> KeySet:
    if key.source is not query.source:
        return reduced_keys(key.source, query.source, flow) or Tokens(grouped.keys.shape[1])
    tokens = torch.arange(math.prod(shape_of(query.source)[:-1]) // shape_of(query.source)[grouped.batch_axis])
    if torch.equal(grouped.keys[0], tokens):
        return Global()
    if len(tokens) > 1 and grouped.keys.shape[1] == 1:
        raise Refusal(
            "every query sees a single key: attention runs over an axis of length one",
            "look which axis holds the tokens (batch_first)",
        )
    return Tokens(grouped.keys.shape[1])


def _is_one_block(query: Projected, key: Projected, grouped: Grouping, bias: Bias | None, flow: Dataflow) -> bool:
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
            "the map that the windows are cut from is not known", "let the tokens come from a convolution of the image"
        )
    return query.source, grid


def _nodes(
    core: Core,
    head_groups: str,
    source: Node,
    key_source: Node | None,
    merged: _Merged | None,
    batch_axis: int,
    linears: tuple[Node, ...],
    placement: Placement | None = None,
) -> AttentionNodes:
    return AttentionNodes(
        core.query, core.key, core.value, core.output, core.product, core.groups, head_groups, source, key_source,
        merged.linear if merged else None, merged.result if merged else None, batch_axis, linears,
        placement, core.weights,
    )  # fmt: skip


def _head_groups(core: Core, *parts: Projected) -> str:
    """The group axes along which the weight rows change."""
    sizes = group_sizes(core)
    letters = []
    for position, letter in enumerate(core.groups):
        rows = [part.channel.view(*sizes, -1) for part in parts]
        if any(bool((row != row.narrow(position, 0, 1)).any()) for row in rows) or len(core.groups) == 1:
            letters.append(letter)
    return "".join(letters) or core.groups[-1:]


def _at_groups(values: Tensor, core: Core, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ``[queries, keys]`` parts of a tensor given per group axis, and which of them each group has."""
    distinct = values.shape[:-2]
    part = torch.arange(math.prod(distinct)).view(distinct).expand(group_sizes(core)).flatten()
    return values.flatten(0, -3), part[groups]


def _of_groups(values: Tensor, core: Core, groups: Tensor) -> Tensor:
    """``[len(groups), queries, keys]``; one row if it is the same for all."""
    parts, part = _at_groups(values, core, groups)
    return parts if len(parts) == 1 else parts[part]


def _differ(parts: Tensor, one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other) and not torch.equal(parts[one], parts[other])


def _bias(core: Core, grouped: Grouping, flow: Dataflow) -> Bias | None:
    """The learned bias of every head; of one alone if it is the same for all."""
    if core.bias is None:
        return None
    parts, part = _at_groups(core.bias, core, grouped.group_of_head)
    if any(_differ(parts, part[:, 0], other) for other in part.T[1:]):
        raise Refusal("the learned bias differs from window to window", "share it between the windows")
    values = parts if len(parts) == 1 else parts[part[:, 0]]
    sources = [flow.provenance_of_constant(node) for node in core.addends]
    kind = "dense" if all(source.op == "placeholder" for source in sources) else "mlp"
    return Bias(kind, core.addends, values, tuple(values.shape))


def _mask(core: Core, grouped: Grouping) -> Tensor | None:
    """The constant mask of every group, ``[groups, queries, keys]``."""
    if core.mask is None:
        return None
    parts, part = _at_groups(core.mask, core, grouped.group_of_head)
    if any(_differ(parts, part[0], other) for other in part[1:]):
        raise Refusal("the mask differs from head to head", "give all heads the same mask")
    return parts.expand(part.shape[1], -1, -1) if len(parts) == 1 else parts[part[0]]


def _dropout(core: Core) -> float:
    rates = [float(argument(node, 1)) for node in core.nodes if operator_name(node) == "aten::dropout"]
    return max(rates, default=0.0)


def _with_dropout(site: AttentionSite, flow: Dataflow) -> AttentionSite:
    """A rate that eval mode passes as zero is not in the graph, but in the module that mixes the values."""
    if site.dropout:
        return site
    mixing = flow.capture.enclosing_call([site.nodes.output.node])
    return replace(site, dropout=training_dropout(mixing, site.scale))


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


def _path(flow: Dataflow, nodes: list[Node]) -> str:
    return flow.capture.enclosing_call(nodes).path
