"""Attention on some of its query rows: which ones are looked at, and what the captured graph makes of them alone.

Every query is attended for by itself, so the captured operations between the product and its sum over the values run
on some rows of the queries just as well; only sizes that are spelled out, and constants that lie beside the queries,
must be cut with them. Nothing is then as large as all queries by all keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.contraction import contraction
from ..graph.dataflow import Dataflow
from ..graph.movement import permutation
from ..graph.values import Values, cast, evaluate, needed_nodes, operator_name, run_node, shape_of
from ..ir.sites import AttentionSite

FEW = 2**18
"""Pairs of a query and a key, of one group, up to which all queries are looked at."""

SAMPLE = 64
"""Queries of a group that are looked at where there are more: the first, the last, and others by chance."""

_SIZED = {"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::expand"}
"""Operators whose second argument is the shape of their result."""

_RESHAPING = {*_SIZED, "aten::unsqueeze", "aten::squeeze"}


@dataclass(frozen=True)
class QueryRows:
    """The ``places`` on the query axis that are looked at, of ``count``; ``axes`` is that axis in every value between
    the query operand and the output, both included."""

    places: Tensor
    count: int
    axes: Mapping[Node, int]

    def with_first(self, count: int) -> QueryRows:
        """These, and the first ``count`` queries."""
        return replace(self, places=torch.cat([torch.arange(count), self.places]).unique())

    def __str__(self) -> str:
        return f"{len(self.places)} of {self.count} queries"


def sampled_rows(site: AttentionSite, flow: Dataflow) -> QueryRows | None:
    """A seeded sample of query rows; None for all of them, if they are few or the captured graph cannot be cut."""
    count, keys = extents(site)
    if count * keys <= FEW or count <= SAMPLE:
        return None
    axes = _query_axes(site, flow)
    return None if axes is None else QueryRows(sample_of(count), count, axes)


def sample_of(count: int) -> Tensor:
    """``SAMPLE`` of ``count`` places, ascending and the same every time, the first and the last among them; all if they
    are no more."""
    if count <= SAMPLE:
        return torch.arange(count)
    inner = torch.randperm(count - 2, generator=torch.Generator().manual_seed(0))[: SAMPLE - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([count - 1])])


def extents(site: AttentionSite) -> tuple[int, int]:
    """Queries and keys of a group."""
    query, key = site.nodes.query, site.nodes.key
    return shape_of(query.node)[query.axes.index("x")], shape_of(key.node)[key.axes.index("y")]


def cut(value: Tensor, axis: int, rows: QueryRows | None) -> Tensor:
    """The rows of ``value`` along ``axis``; all of it without ``rows``."""
    return value if rows is None else value.index_select(axis, rows.places.to(value.device))


def captured_mixture(
    site: AttentionSite, flow: Dataflow, operands: Values, rows: QueryRows | None, dtype: torch.dtype | None
) -> Tensor:
    """What the captured graph makes of the ``operands``: the site's output node, of the query rows alone.

    With ``dtype`` everything is computed in it, as by ``evaluate``.
    """
    nodes = site.nodes
    query, output = nodes.query.node, nodes.output.node
    if rows is None:
        return evaluate([output], operands, flow.capture, flow.constants, dtype)[output]
    values: Values = {**operands, query: cut(operands[query], rows.axes[query], rows)}
    for node in needed_nodes([output], operands, flow.constants):
        if node in flow.constants:
            values[node] = cast(flow.constants[node], dtype)
        elif node in rows.axes:
            beside = _beside(node, values, rows, flow)
            values[node] = run_node(node, beside, dtype, _arguments(node, rows))
        else:
            values[node] = run_node(node, values, dtype)
    return values[output]


def _query_axes(site: AttentionSite, flow: Dataflow) -> dict[Node, int] | None:
    """The query axis of everything between query operand and output; None where that is not known for all of it."""
    nodes = site.nodes
    query, output = nodes.query.node, nodes.output.node
    if query in (nodes.key.node, nodes.value.node):  # cut as queries it would be cut as keys
        return None
    operands = {nodes.query.node, nodes.key.node, nodes.value.node}
    axes = {query: nodes.query.axes.index("x")}
    for node in needed_nodes([output], dict.fromkeys(operands), flow.constants):
        cut_ones = [used for used in node.all_input_nodes if used in axes]
        if node in flow.constants or not cut_ones:
            continue
        axis = _axis_after(node, cut_ones, axes)
        if axis is None:
            return None
        axes[node] = axis
    return axes if axes.get(output) == nodes.output.axes.index("x") else None


def _axis_after(node: Node, operands: list[Node], axes: Mapping[Node, int]) -> int | None:
    """Where the query axis of its ``operands`` lies in ``node``'s result."""
    operand, name = operands[0], operator_name(node)
    axis, found = axes[operand], contraction(node)
    if found is not None:
        letter = found.axes_of(operand)[axis]
        return found.out_axes.index(letter) if len(operands) == 1 and letter in found.out_axes else None
    if not isinstance(operand.meta["val"], Tensor) or not isinstance(node.meta["val"], Tensor):
        return axis  # a maximum and its place, or one of the two
    given, made = shape_of(operand), shape_of(node)
    order = permutation(node)
    if order is not None:
        return order.index(axis)
    if name in _RESHAPING:
        return _axis_of_view(given, made, axis)
    behind = len(given) - axis
    alike = all(len(shape_of(used)) - axes[used] == behind for used in operands)
    spelled = any(isinstance(argument, list | tuple) and len(argument) > 1 for argument in node.args)
    if not alike or spelled or len(made) < len(given) or made[len(made) - behind] != given[axis]:
        return None
    return len(made) - behind


def _axis_of_view(given: tuple[int, ...], made: tuple[int, ...], axis: int) -> int | None:
    """The axis of a view of the same extent with as many elements behind it."""
    behind = math.prod(given[axis + 1 :])
    places = [i for i, size in enumerate(made) if size == given[axis] and math.prod(made[i + 1 :]) == behind]
    return places[-1] if places and given[axis] > 1 else None


def _arguments(node: Node, rows: QueryRows) -> tuple[Any, ...]:
    """Those of ``node``, with the size of the rows where that of the whole query axis is spelled out."""
    if operator_name(node) not in _SIZED:
        return node.args
    sizes = list(shape_of(node))
    sizes[rows.axes[node]] = len(rows.places)
    return node.args[0], sizes


def _beside(node: Node, values: Values, rows: QueryRows, flow: Dataflow) -> Values:
    """The operands of ``node``, constants that have the whole query axis cut like the rest."""
    if contraction(node) is not None or not isinstance(node.meta["val"], Tensor):
        return values
    behind = len(shape_of(node)) - rows.axes[node]
    constants = {used: values[used] for used in node.all_input_nodes if used in flow.constants}
    return values | {
        used: cut(value, value.ndim - behind, rows)
        for used, value in constants.items()
        if value.ndim >= behind and value.shape[value.ndim - behind] == rows.count
    }


__all__ = ["FEW", "SAMPLE", "QueryRows", "captured_mixture", "cut", "extents", "sample_of", "sampled_rows"]
