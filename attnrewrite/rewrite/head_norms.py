"""The norms of queries and keys, and the learned scales of their scores, on heads-last values of a whole map."""

from __future__ import annotations

from torch import fx
from torch.fx import Node

from ..errors import Refusal
from ..graph.values import shape_of
from ..ir.sites import AttentionSite, HeadNorm
from ..numerics.head_norm import normalize_heads, scale_heads
from .editable import Editable


def normalized(outlined: Editable, site: AttentionSite, norm: HeadNorm | None, value: Node) -> Node:
    """``value`` through the donor's own norm where that is a child, else through ours, with the donor's weights."""
    if norm is None:
        return value
    made = outlined.made.get(norm.node, [])
    if made and made[0].op == "call_module":
        return again(outlined, site, made[0], value)
    weights = [None if node is None else outlined.value(node) for node in (norm.weight, norm.bias)]
    return outlined.graph.call_function(normalize_heads, (value, norm.kind, norm.place, norm.eps, *weights))


def scaled(outlined: Editable, site: AttentionSite, query: Node) -> Node:
    """Queries times the learned scales of the scores, still computed from their parameters."""
    for scale in site.learned_scales:
        query = outlined.graph.call_function(scale_heads, (query, outlined.value(scale)))
    return query


def again(outlined: Editable, site: AttentionSite, made: Node, value: Node) -> Node:
    """The same call on another value, which has the tokens of the site's source: the first operand is exchanged."""
    if made.op == "call_module":
        if len(made.all_input_nodes) != 1:
            raise Refusal("a projection is called with more than its input")
        if shape_of(made.all_input_nodes[0]) != shape_of(site.source):
            outlined.moved.add(str(made.target))
        swapped = fx.node.map_arg((made.args, made.kwargs), lambda _: value)
        return outlined.graph.call_module(made.target, *swapped)  # type: ignore[arg-type]  # fx's loose types
    return outlined.graph.call_function(made.target, (value, *made.args[1:]), dict(made.kwargs))  # type: ignore[arg-type]  # as above
