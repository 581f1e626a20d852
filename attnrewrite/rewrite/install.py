"""Put new cores where sites were, in a graph that can be edited."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..cores import InTokenOrder
from ..errors import Refusal
from ..graph.values import shape_of
from ..ir.contract import BesideStem, BetweenLinears, BetweenProjections, Conversion, WholeSite
from ..ir.core import AttentionCore, Operands, StageCore
from ..ir.heads import from_heads_last, heads_last, merge_heads, take_heads, zero_token
from ..ir.sites import AttentionSite, MapGroups, MlpSite, Operand, Projection, Site, StemSite
from .attention_weights import Reader, unit_mixture
from .editable import Editable
from .head_norms import again, normalized, scaled


def install(outlined: Editable, site: Site, conversion: Conversion) -> Reader | None:
    """Replace what ``site`` computes in the graph by a call of the conversion's core, a new child of the module.

    Returns:
        What computes the attention weights of the new core, if it has any.

    Raises:
        Refusal: the site's values are not where the graph can replace them.
    """
    match conversion:
        case WholeSite():
            _whole(outlined, site, conversion)
        case BetweenProjections(core=core):
            assert isinstance(site, AttentionSite)
            if not isinstance(site.keys, MapGroups):
                return _operands(outlined, site, core)
            _windowed(outlined, site, core)
        case BetweenLinears(cores=cores):
            assert isinstance(site, MlpSite)
            _mlp(outlined, site, cores)
        case BesideStem(core=core):
            assert isinstance(site, StemSite)
            _stem(outlined, site, core)
    return None


def must_open(site: Site, conversion: Conversion) -> tuple[list[Node], list[Node]]:
    """Captured nodes that a graph must show itself, and those it may also show as the result of a child."""
    if isinstance(conversion, WholeSite):
        ends = whole_ends(site, conversion)
        return [], [*ends, *([site.nodes.out_proj] if isinstance(site, AttentionSite) and site.nodes.out_proj else [])]
    if isinstance(site, MlpSite):
        return [stage.node for stage in site.stages if stage.kind in ("activation", "gate")], []
    if isinstance(site, StemSite):
        return [site.tokens or site.result], [site.source if site.patches is not None else site.result]
    nodes = site.nodes
    if isinstance(site.keys, MapGroups):
        norms = [norm.node for norm in (site.query_norm, site.key_norm) if norm is not None]
        return [], [n for n in (*nodes.linears, nodes.out_proj, nodes.source, nodes.result) if n is not None] + norms
    assert isinstance(conversion, BetweenProjections)
    projected_again = conversion.core.operands is Operands.OWN_MAP_TOO
    return [nodes.product, nodes.output.node], list(nodes.linears) if projected_again else []


def whole_ends(site: Site, conversion: WholeSite) -> tuple[Node, Node]:
    """What the module is given, and what its result replaces."""
    return site.source, conversion.until or site.result


def _operands(outlined: Editable, site: AttentionSite, core: AttentionCore) -> Reader | None:
    """Query, key and value stay as they are computed; the product with the values is replaced."""
    nodes, graph = site.nodes, outlined.graph
    old = outlined.first(nodes.output.node)

    def query() -> Node:
        return scaled(outlined, site, _heads_last(outlined, site, nodes.query, nodes.product))

    def key() -> Node:
        return _heads_last(outlined, site, nodes.key, nodes.product)

    with graph.inserting_before(old):
        parts = [query()]
        local: dict[str, Any] = {}
        if core.operands is Operands.TOKENS:
            local = {"pixels": outlined.value(site.source)}
        else:
            parts += [key(), _heads_last(outlined, site, nodes.value, nodes.output.node)]
        if core.operands is Operands.OWN_MAP_TOO:
            local = _local_operands(outlined, site)
        name = outlined.add_module("attention", core)
        new = graph.call_module(name, (*parts, *_dense_bias(outlined, site)), local)
        groups = (nodes.batch_groups, nodes.head_groups, site.head_sizes)
        new = graph.call_function(from_heads_last, (new, nodes.output.axes, *groups))
    _replace(old, new)
    if not core.only_weighs_values:
        return None
    return lambda: graph.call_function(
        unit_mixture, (graph.get_attr(name), query(), key(), *_dense_bias(outlined, site))
    )


def _heads_last(outlined: Editable, site: AttentionSite, part: Operand, consumer: Node) -> Node:
    groups = (site.nodes.batch_groups, site.nodes.head_groups, site.head_sizes)
    operand = outlined.argument(consumer, part.node)
    return outlined.graph.call_function(heads_last, (operand, part.axes, *groups))


def _local_operands(outlined: Editable, site: AttentionSite) -> dict[str, Any]:
    """The projections that made keys and values of the reduced map, of the query map itself."""
    assert site.key is not None
    assert site.value is not None
    source = outlined.value(site.source)
    project = _projector(outlined, site, source)
    return {"local_key": project(site.key, source), "local_value": project(site.value, source)}


def _dense_bias(outlined: Editable, site: AttentionSite) -> tuple[Node, ...]:
    """``[1 or batch, heads, queries, keys]``: the learned addends, still computed from their parameters, which a model
    may have spread over the samples, and a constant mask."""
    graph = outlined.graph
    terms = []
    if site.bias is not None:
        shape = [-1, *site.bias.values.shape]
        terms = [graph.call_method("reshape", (_addend(outlined, n, shape), shape)) for n in site.bias.nodes]
    if site.mask is not None:
        dtype = site.nodes.query.node.meta["val"].dtype
        terms.append(outlined.add_constant(site.mask[None].to(dtype)))
    if not terms:
        return ()
    total = terms[0]
    for term in terms[1:]:
        total = graph.call_function(operator.add, (total, term))
    return (total,)


def _windowed(outlined: Editable, site: AttentionSite, core: AttentionCore) -> None:
    """The projections act on the map itself, and the blocks are cut in the core: no roll, no partition, no mask."""
    graph = outlined.graph
    assert site.query is not None
    assert site.key is not None
    assert site.value is not None
    assert site.output is not None
    old = outlined.latest(site.result)
    with graph.inserting_before(old):
        source = outlined.value(site.source)
        project = _projector(outlined, site, source)
        query, key, value = (project(part, source) for part in (site.query, site.key, site.value))
        query = scaled(outlined, site, normalized(outlined, site, site.query_norm, query))
        arguments: list[Node | None] = [query, normalized(outlined, site, site.key_norm, key), value]
        arguments += _block_bias(outlined, site)
        if core.padded is not None:
            zero = graph.call_function(zero_token, (source,))
            call = partial(_padding_call, outlined, site, query, core.padded.size)
            padding = _projector(outlined, site, source, call)
            key, value = (graph.call_function(operator.getitem, (padding(p, zero), 0)) for p in (site.key, site.value))
            arguments += [*([None] if site.bias is None else []), normalized(outlined, site, site.key_norm, key), value]
        placed = core if site.place is None else InTokenOrder(core, site.place, site.map_grid)
        if site.place is not None:
            outlined.tied.append("the order of its tokens")
        mixed = graph.call_module(outlined.add_module("attention", placed), tuple(arguments))
        head_step, start, dim_step = _steps(site.output.rows)
        if start or (head_step, dim_step) not in ((site.output.head_dim, 1), (1, site.heads)):
            raise Refusal("the heads are merged in an irregular order")
        mixed = graph.call_function(merge_heads, (mixed, head_step, dim_step))
        if len(shape_of(site.result)) == 3 and site.place is None:
            mixed = graph.call_method("flatten", (mixed, 1, 2))
        new = _after_projection(outlined, site, mixed)
    _replace(old, new)


def _projector(
    outlined: Editable, site: AttentionSite, source: Node, call: Callable[[Node, Node], Node] | None = None
) -> Callable[[Projection, Node], Node]:
    """Calls the projections' own modules on whole maps, each once for each value."""
    calls: dict[tuple[Node, Node], Node] = {}
    graph = outlined.graph
    linears = {made.args[1]: made for made in site.nodes.linears}
    call = call or partial(again, outlined, site)

    def project(part: Projection, value: Node) -> Node:
        linear = linears[part.weight]
        if (linear, value) not in calls:
            calls[linear, value] = call(outlined.first(linear), value)
        head_step, start, dim_step = _steps(part.rows)
        taken = graph.call_function(
            take_heads, (calls[linear, value], start, part.heads, part.head_dim, head_step, dim_step)
        )
        if value is source and len(shape_of(site.source)) == 3 and site.place is None:
            return graph.call_method("unflatten", (taken, 1, (site.map_grid.height, site.map_grid.width)))
        return taken

    return project


def _padding_call(
    outlined: Editable, site: AttentionSite, image: Node, window: tuple[int, int], made: Node, zero: Node
) -> Node:
    """The call ``made`` on a padded slot, which hooks see on maps that have such slots."""
    if made.op != "call_module":
        return again(outlined, site, made, zero)
    module = outlined.graph.get_attr(str(made.target))
    return outlined.graph.call_function(project_padding, (module, zero, image, window))


def project_padding(module: nn.Module, zero: Tensor, image: Tensor, window: tuple[int, int]) -> Tensor:
    """What ``module`` makes of a padded slot. On a map that windows divide there is none, and the model itself calls
    it for none: no hook sees that."""
    divided = all(side % size == 0 for side, size in zip(image.shape[1:3], window, strict=True))
    made: Tensor = module.forward(zero) if divided else module(zero)
    return made


def _block_bias(outlined: Editable, site: AttentionSite) -> list[Node]:
    if site.bias is None:
        return []
    graph, shape = outlined.graph, [site.heads, *site.bias.values.shape[1:]]
    terms = [graph.call_method("reshape", (_addend(outlined, node, shape), shape)) for node in site.bias.nodes]
    total = terms[0]
    for term in terms[1:]:
        total = graph.call_function(operator.add, (total, term))
    return [total]


def _addend(outlined: Editable, captured: Node, shape: list[int]) -> Node:
    given, wanted = captured.meta["val"].numel(), torch.Size(size for size in shape if size != -1).numel()
    if given != wanted and (-1 not in shape or given != wanted * outlined.capture.batch):
        raise Refusal("the learned bias is not given once for every head, query and key")
    value = outlined.value(captured)
    outlined.guard_tables(value)
    return value


def _after_projection(outlined: Editable, site: AttentionSite, mixed: Node) -> Node:
    """The output projection and what follows it up to the result, without the rearrangement of tokens."""
    assert site.nodes.out_proj is not None
    return _after_merge(outlined, site, again(outlined, site, outlined.first(site.nodes.out_proj), mixed))


def _after_merge(outlined: Editable, site: AttentionSite, new: Node) -> Node:
    """What follows the output projection up to the result, on another value of it: dropout, for one."""
    assert site.nodes.out_proj is not None
    first, step = outlined.first(site.nodes.out_proj), outlined.latest(site.result)
    follow = []
    while step is not first:
        if step.op == "call_module":
            follow.append(step)
        if not step.all_input_nodes:
            raise Refusal("the result does not come from the output projection")
        step = step.all_input_nodes[0]
    for step in reversed(follow):
        new = again(outlined, site, step, new)
    return new


def _mlp(outlined: Editable, site: MlpSite, cores: Sequence[StageCore | None]) -> None:
    """The activations become the core's; linear maps, convolution and dropout stay live."""
    graph = outlined.graph
    for stage, core in zip(site.stages, cores, strict=True):
        if core is None:
            continue
        old = outlined.first(stage.node)
        with graph.inserting_before(old):
            operands = [outlined.latest(stage.before)]
            if stage.gate_value is not None:
                operands.append(outlined.latest(stage.gate_value))
            new = graph.call_module(outlined.add_module("mlp", core), tuple(operands), _source(outlined, site, core))
        _replace(old, new)


def _stem(outlined: Editable, site: StemSite, core: StageCore) -> None:
    """What follows the convolution, or the gathering of patches before the linear map, becomes the core's; a core that
    takes the source as well acts on what the convolution gives."""
    old = outlined.latest(site.result if core.takes_source else site.tokens or site.result)
    beside = outlined.graph.inserting_after(old) if core.takes_source else outlined.graph.inserting_before(old)
    with beside:
        arguments: tuple[Any, ...] = (outlined.latest(site.source if site.patches is not None else site.result),)
        if core.takes_sides and len(shape_of(site.source)) == 3 and site.grid is not None:
            arguments += (site.grid.height, site.grid.width)
        new = outlined.graph.call_module(outlined.add_module("stem", core), arguments, _source(outlined, site, core))
    _replace(old, new)


def _source(outlined: Editable, site: MlpSite | StemSite, core: StageCore) -> dict[str, Any]:
    return {"source": outlined.latest(site.source)} if core.takes_source else {}


def _whole(outlined: Editable, site: Site, conversion: WholeSite) -> None:
    """From the value that feeds the first linear maps to that of the last one."""
    graph, (source, result) = outlined.graph, whole_ends(site, conversion)
    old, adapter = outlined.latest(result), conversion.adapter
    with graph.inserting_before(old):
        name, value = outlined.add_module(site.kind, conversion.core), outlined.value(source)
        if adapter is None:
            new = graph.call_module(name, (value,))
        else:
            new = graph.call_function(adapter.run, (graph.get_attr(name), value, *adapter.sizes))
        if isinstance(site, AttentionSite):
            new = _after_merge(outlined, site, new)
    _replace(old, new)


def _replace(old: Node, new: Node) -> None:
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _steps(rows: Tensor) -> tuple[int, int, int]:
    """``(head step, start, dim step)`` of weight rows that are an arithmetic progression in head and dim."""
    heads, dims = rows.shape
    start = int(rows[0, 0])
    head_step = int(rows[1, 0]) - start if heads > 1 else dims
    dim_step = int(rows[0, 1]) - start if dims > 1 else 1
    expected = start + torch.arange(heads)[:, None] * head_step + torch.arange(dims) * dim_step
    if not torch.equal(rows, expected):
        raise Refusal("the channels of the heads are packed in an irregular order")
    return head_step, start, dim_step
