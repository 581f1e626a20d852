"""From a core's operands back to the projections: which weight row, which token, which head.

Everything is read from addresses: the flat positions that index propagation finds for every element of an operand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import Refusal
from ..graph.contraction import canonical
from ..graph.dataflow import Dataflow
from ..graph.values import argument, input_of, shape_of
from ..ir.axes import position_and_dim
from ..ir.sites import AttentionNodes, Operand, Placement, Projection
from .mixture import Core


@dataclass(frozen=True)
class Projected:
    """An operand made from one linear map by data movement.

    ``token[group, position]`` is a flat position among the tokens of ``source`` (-1: padding), ``row`` likewise among
    those of the linear map's own input, and ``channel[group, dim]`` a row of its weight. ``factor`` multiplies the
    operand on the way.
    """

    linear: Node
    source: Node
    token: Tensor
    row: Tensor
    channel: Tensor
    factor: float

    @property
    def of_own_input(self) -> Projected:
        """The same, with the linear map's own input for a source."""
        return replace(self, source=input_of(self.linear), token=self.row)


@dataclass(frozen=True)
class Grouping:
    """Sample 0's groups: ``queries[group, i]`` and ``keys[group, j]`` are tokens (-1: padding), the same for all heads.

    ``group_of_head[head]`` are the flat group positions of that head, in the order of the rows of ``queries``.
    ``placement`` says it of every sample's groups, as they lie in the operands.
    """

    queries: Tensor
    keys: Tensor
    group_of_head: Tensor
    batch_axis: int
    placement: Placement


def projected(operand: Operand, core: Core, flow: Dataflow) -> Projected | None:
    """Read ``operand`` as a rearranged linear map, or None if something else acts on it after the projection.

    Raises:
        Refusal: tokens and channels are entangled.
    """
    found = flow.provenance(operand.node, stop=flow.is_linear, scaling=True)
    linear = found.source
    if linear is None or not flow.is_linear(linear):
        return None
    return read_projected(linear, found.spelling, lambda: found.address, found.factor, operand, core, flow)


def read_projected(
    linear: Node,
    spelling: str,
    address: Callable[[], Tensor],
    factor: float,
    operand: Operand,
    core: Core,
    flow: Dataflow,
) -> Projected:
    """``operand`` made of ``linear``'s result: ``address``, shaped as the operand, is where each element came from, and
    ``spelling`` all that it hangs on.

    Raises:
        Refusal: tokens and channels are entangled.
    """
    width = shape_of(linear)[-1]
    order = core.groups + "".join(position_and_dim(operand.axes))
    sizes = tuple(group_sizes(core))

    def separated() -> tuple[Tensor, Tensor] | str:
        places = canonical(address(), operand.axes, order).expand(*sizes, -1, -1).flatten(0, -3)
        found = _tokens_and_channels(places, width)
        if found is None and _tokens_and_channels(places.mT, width) is not None:
            return (
                f"attention over channels: the product of its queries {list(shape_of(operand.node))} with the keys "
                "sums over the tokens, so that no token attends to another"
            )
        return found or f"an operand {list(shape_of(operand.node))} mixes tokens and channels"

    found = flow.once((read_projected, spelling, operand.axes, order, sizes, width), separated)
    if isinstance(found, str):
        raise Refusal(found)
    row, channel = found
    source, slots = flow.remembered(source_tokens, input_of(linear))
    return Projected(linear, source, slots[row], row, channel, factor)


def _tokens_and_channels(places: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """The token of every position and the channel of every dim, of ``[group, position, dim]`` flat addresses."""
    token, channel = places[..., 0] // width, places[:, 0] % width
    separable = torch.equal(places, (token * width)[..., None] + channel[:, None])
    return (token, channel) if separable and not bool((token < 0).any()) else None


def source_tokens(node: Node, flow: Dataflow) -> tuple[Node, Tensor]:
    """The value whose tokens ``node`` rearranges, and for every token of ``node`` its position there (-1: padding).

    A source whose channels are not its last axis is not looked for: then ``node`` is its own source.
    """
    width = shape_of(node)[-1]
    own = (node, torch.arange(node.meta["val"].numel() // width))
    if not flow.is_movement(node):
        return own
    found = flow.provenance(node)
    source = found.source
    if source is None or shape_of(source)[-1] != width:
        return own
    address = found.address.reshape(-1, width)
    padding = address[:, :1] < 0
    expected = torch.where(padding, -1, address[:, :1] + torch.arange(width))
    if bool((address != expected).any()) or bool((address[:, 0] % width > 0)[~padding[:, 0]].any()):
        return own
    return source, torch.where(padding[:, 0], -1, address[:, 0] // width)


def group_sizes(core: Core | AttentionNodes) -> list[int]:
    """Extent of every group axis, broadcasting resolved."""
    operands = (core.query, core.key, core.value)
    extents = [dict(zip(operand.axes, shape_of(operand.node), strict=True)) for operand in operands]
    return [max(extent.get(axis, 1) for extent in extents) for axis in core.groups]


def grouping(query: Projected, key: Projected, value: Projected) -> Grouping:
    """Split the flat groups into heads and groups of tokens.

    Raises:
        Refusal: heads see different tokens, or a group reaches over several samples.
    """
    if key.source is not value.source or not torch.equal(key.token, value.token):
        raise Refusal("keys and values are taken from different tokens", "project both from the same tokens")
    heads = _heads(query, key, value)
    queries, keys = query.token[heads], key.token[heads]
    if bool((queries != queries[:1]).any()) or bool((keys != keys[:1]).any()):
        raise Refusal("different heads see different tokens", "group the tokens of all heads the same way")
    queries, keys = queries[0], keys[0]
    axis = _batch_axis(query.source, queries)
    queries, samples = _within_sample(queries, query.source, axis)
    same = key.source is query.source or len(shape_of(key.source)) == len(shape_of(query.source))
    keys, key_samples = _within_sample(keys, key.source, axis if same else 0)
    sample = samples.amax(dim=1)
    if bool(((samples >= 0) & (samples != sample[:, None])).any()):
        raise Refusal("a group spans several samples", "group tokens within each sample")
    if bool(((key_samples >= 0) & (key_samples != sample[:, None])).any()):
        raise Refusal("queries and keys come from different samples", "take both from the same sample")
    first = sample == sample.amin()
    count = int(sample.unique().numel())
    if int(first.sum()) * count != len(sample):
        raise Refusal("samples are grouped differently", "group the tokens of all samples the same way")
    head_of_group = torch.empty(heads.numel(), dtype=torch.long)
    head_of_group[heads] = torch.arange(len(heads))[:, None]
    placement = Placement(head_of_group, query.token, key.token)
    return Grouping(queries[first], keys[first], heads[:, first], axis, placement)


def projection(part: Projected, grouped: Grouping) -> Projection:
    """Weight rows of one operand, ``[heads, head_dim]``."""
    rows = part.channel[grouped.group_of_head[:, 0]]
    return Projection(argument(part.linear, 1), argument(part.linear, 2), rows)


def _heads(*parts: Projected) -> Tensor:
    """``[heads, groups of a head]`` flat group positions; a head is a distinct set of weight rows."""
    rows = torch.cat([part.channel for part in parts], dim=1)
    _, inverse, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    if bool((counts != counts[0]).any()):
        raise Refusal("heads have different numbers of groups", "group the tokens of all heads the same way")
    order = torch.argsort(inverse, stable=True).view(len(counts), -1)
    return order[torch.argsort(order[:, 0])]


def _batch_axis(source: Node, queries: Tensor) -> int:
    """The axis along which no group extends; the first one if there are several."""
    sizes = shape_of(source)[:-1]
    for axis in range(min(2, len(sizes))):
        place = _coordinate(queries, sizes, axis)
        if not bool(((queries >= 0) & (place != place.amax(dim=1, keepdim=True))).any()) and len(sizes) > 1:
            return axis
    raise Refusal("it has no batch axis: a group spans all axes", "keep a batch axis through the attention")


def _within_sample(tokens: Tensor, source: Node, axis: int) -> tuple[Tensor, Tensor]:
    """Positions among one sample's tokens, and the sample; -1 for padding in both."""
    sizes = shape_of(source)[:-1]
    inner = 1
    for size in sizes[axis + 1 :]:
        inner *= size
    sample = _coordinate(tokens, sizes, axis)
    outer = tokens.clamp(min=0) // (inner * sizes[axis])
    position = outer * inner + tokens.clamp(min=0) % inner
    return torch.where(tokens < 0, -1, position), sample


def _coordinate(tokens: Tensor, sizes: tuple[int, ...], axis: int) -> Tensor:
    inner = 1
    for size in sizes[axis + 1 :]:
        inner *= size
    return torch.where(tokens < 0, -1, tokens.clamp(min=0) // inner % sizes[axis])
