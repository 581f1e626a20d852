"""The way of mixed values to the output projection, and on to where their tokens lie as at the source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import Refusal
from ...graph.contraction import canonical
from ...graph.dataflow import Dataflow
from ...graph.movement import Provenance
from ...graph.values import argument, digest, input_of, shape_of
from ...ir.sites import Projection
from ...lift.mixture import Core
from ...lift.projections import Grouping, Projected


@dataclass(frozen=True)
class OutProj:
    """The output projection, and the first value after it whose tokens lie as those of the source."""

    linear: Node
    result: Node
    projection: Projection


def output_projection(
    core: Core,
    query: Projected,
    source_shape: tuple[int, ...],
    ranks: Tensor | None,
    grouped: Grouping,
    flow: Dataflow,
) -> OutProj | None:
    """Follow the product with the values through data movement to a linear map and on to the source's token order;
    of querying tokens alone, to the order of their ``ranks``."""
    linear = follow(core.output.node, flow, flow.is_linear)
    if linear is None:
        return None
    found = flow.provenance(input_of(linear), stop=lambda node: node is core.output.node)
    if found.source is not core.output.node:
        return None
    axes, shape = core.output.axes, shape_of(core.output.node)
    told_by = (digest(query.token), digest(query.channel), digest(grouped.group_of_head))
    key = (output_projection, found.spelling, axes, shape, core.groups, *told_by)
    read = flow.once(key, lambda: _tokens_and_columns(core, query, grouped, found))
    if read is None:
        return None
    token, columns = read
    result = _in_source_order(linear, token if ranks is None else ranks[token], source_shape, flow)
    output = Projection(argument(linear, 1), argument(linear, 2), columns)
    return None if result is None else OutProj(linear, result, output)


def _tokens_and_columns(
    core: Core, query: Projected, grouped: Grouping, mixed: Provenance
) -> tuple[Tensor, Tensor] | None:
    """The token of every row that goes into the output projection, and ``[heads, dims]`` the column of every channel;
    None if rows mix tokens."""
    if bool((mixed.address < 0).any()):
        return None
    extents = dict(zip(core.output.axes, shape_of(core.output.node), strict=True))
    heads, dims = len(grouped.group_of_head), extents["e"]
    width = heads * dims
    head = _heads_of_groups(query, grouped.group_of_head)
    number = (query.token * width)[..., None] + (head * dims)[:, None, None] + torch.arange(dims)
    number = number.view(*(extents[axis] for axis in core.groups), *number.shape[1:])
    number = canonical(number, core.groups + "xe", core.output.axes).flatten()
    number = number[mixed.address.reshape(-1, mixed.address.shape[-1])]  # token and column of every channel
    token, column = number[:, 0] // width, number[0] % width
    if len(column) != width or not torch.equal(number, (token * width)[:, None] + column):
        return None
    return token, torch.argsort(column).view(heads, dims)


def _heads_of_groups(query: Projected, group_of_head: Tensor) -> Tensor:
    """The head of every flat group, of all samples: heads are told apart by their weight rows."""
    rows = query.channel[group_of_head[:, 0]]
    if len(torch.unique(rows, dim=0)) != len(rows):
        raise Refusal("heads share their queries", "give every head its own queries")
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
        result = linear if wanted(linear) else follow(linear, flow, wanted)
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


def follow(node: Node, flow: Dataflow, reached: Callable[[Node], bool]) -> Node | None:
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
