"""Patch stems and merges: a strided convolution, or patches gathered into channels before a linear map."""

from __future__ import annotations

import math
import operator
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ...capture import NodeRef
from ...errors import UNFORESEEN, unforeseen
from ...graph.dataflow import Dataflow
from ...graph.movement import moved_operands
from ...graph.values import argument, input_of, operator_name, shape_of
from ...ir.contract import recognizer
from ...ir.sites import AttentionSite, Grid, MlpSite, Refused, Site, StemSite
from ..patch_geometry import map_width, patch_geometry


@recognizer(order=2)
def recognize_stems(flow: Dataflow, found: list[Site]) -> list[Site | Refused]:
    """Every convolution that makes a coarser map, and every linear map of gathered patches."""
    reducing = _between_queries_and_keys(found, flow)
    linears = {n for site in found for n in _linears_of(site)}
    convolutions = [
        node
        for node in flow.nodes("aten::conv2d")
        if node not in flow.constants and node not in reducing and _is_patchy(node) and node.args[1] in flow.constants
    ]
    maps = [
        n
        for n in flow.nodes("aten::linear")
        if n not in flow.constants and n not in linears and flow.is_linear(n) and not flow.channel_maps.hold(n)
    ]
    stems: list[Site | Refused] = []
    for node, read in [*((node, _convolution) for node in convolutions), *((node, _merge) for node in maps)]:
        try:
            stem = read(node, flow)
        except UNFORESEEN as cause:
            if read is _merge:  # what cannot be read as gathered patches is some other linear map
                continue
            stem = Refused(flow.capture.enclosing_call([node]).path, "stem", unforeseen(cause))
        stems += [stem] if stem is not None else []
    return stems


def _convolution(node: Node, flow: Dataflow) -> StemSite | Refused | None:
    weight, bias, stride, padding = (argument(node, position) for position in range(1, 5))
    stride, padding = _sides(stride, 1), _sides(padding, 0)
    _, channels, *kernel = weight.meta["val"].shape
    tokens = _as_tokens(node, flow)
    call = flow.capture.enclosing_call([node] if tokens is None else [node, tokens])
    if call.parent is not None and not call.children:  # the convolution itself: its parent can do without it
        call = call.parent
    return StemSite(
        name=flow.capture.enclosing_call([node]).path,
        owner=call,
        in_channels=channels,
        out_channels=shape_of(node)[1],
        kernel=(kernel[0], kernel[1]),
        stride=stride,
        padding=padding,
        source=input_of(node),
        result=node,
        weight=weight,
        bias=bias,
        tokens=tokens,
    )


def _merge(node: Node, flow: Dataflow) -> StemSite | Refused | None:
    """A linear map whose input channels are those of several tokens, normalized first or not."""
    gathered: Node = input_of(node)
    norm = None
    if operator_name(gathered) == "aten::layer_norm" and len(argument(gathered, 1)) == 1:
        norm, gathered = gathered, input_of(gathered)
    call = flow.capture.enclosing_call([gathered, node])
    given = {leaf.node for leaf in tree_leaves(call.arguments) if isinstance(leaf, NodeRef)}
    found = flow.provenance(gathered, stop=lambda n: n in given)
    source = found.source
    if (
        source is None
        or shape_of(gathered)[-1] <= shape_of(source)[-1]
        or shape_of(gathered)[-1] % shape_of(source)[-1]
    ):
        return None
    channels = shape_of(source)[-1]
    address = found.address.unflatten(-1, (-1, channels))
    padding = address < 0
    expected = torch.where(padding, -1, address[..., :1] + torch.arange(channels))
    if not torch.equal(address, expected) or bool((padding.any(-1) != padding.all(-1)).any()):
        return None
    patches = torch.where(padding[..., 0], -1, address[..., 0] // channels)
    side = math.isqrt(patches.shape[-1])
    geometry = patch_geometry(patches, (side, side), map_width(source)) if side * side == patches.shape[-1] else None
    if geometry is None or math.prod(geometry[0]) != math.prod(shape_of(source)[1:-1]):
        return None
    weight, bias = argument(node, 1), argument(node, 2)
    return StemSite(
        name=call.path,
        owner=flow.capture.enclosing_call([gathered]),
        in_channels=channels,
        out_channels=shape_of(node)[-1],
        kernel=(side, side),
        stride=(side, side),
        padding=(0, 0),
        source=source,
        result=node,
        weight=weight,
        bias=bias,
        tokens=gathered,
        patches=patches,
        norm_node=norm,
        grid=Grid(*geometry[0]),
    )


def _as_tokens(node: Node, flow: Dataflow) -> Node | None:
    """The value in which a convolution's map lies with channels last, inside the same module call."""
    call = flow.capture.enclosing_call([node])
    while call.parent is not None and call.enter + 1 >= call.exit:
        call = call.parent
    value, last = node, None
    while True:
        users = [user for user in flow.live_users(value) if user.op == "call_function"]
        if len(users) != 1 or not flow.is_movement(users[0]) or moved_operands(users[0]) != [value]:
            return last
        value = users[0]
        parted = not isinstance(value.meta["val"], Tensor)  # into several, such as one for each sample
        if parted or not call.encloses(flow.capture.position[value]):
            return last
        if channels_last(node, value, flow):
            last = value


def channels_last(conv: Node, value: Node, flow: Dataflow) -> bool:
    """Whether ``value`` is ``conv``'s map with its channels as the last axis, as a map or as tokens."""
    batch, channels, height, width = shape_of(conv)
    if shape_of(value) not in ((batch, height * width, channels), (batch, height, width, channels)):
        return False
    address = flow.provenance(value, stop=lambda n: n is conv).address
    wanted = torch.arange(address.numel()).view(batch, channels, height, width).permute(0, 2, 3, 1)
    return torch.equal(address.flatten(), wanted.flatten())


def _is_patchy(node: Node) -> bool:
    stride, groups = _sides(argument(node, 3, default=1), 1), argument(node, 6, default=1)
    dilation = _sides(argument(node, 5, default=1), 1)
    return max(stride) > 1 and bool(groups == 1) and dilation == (1, 1)


def _sides(value: object, default: int) -> tuple[int, int]:
    if value is None:
        return default, default
    if isinstance(value, int):
        return value, value
    sides = [int(v) for v in value]  # type: ignore[attr-defined]  # one for each axis
    return (sides[0], sides[-1])


def _between_queries_and_keys(found: list[Site], flow: Dataflow) -> set[Node]:
    """Convolutions of a spatial reduction belong to their attention."""
    inside: set[Node] = set()
    for site in found:
        if isinstance(site, AttentionSite) and site.nodes.key_source not in (None, site.nodes.source):
            assert site.nodes.key_source is not None
            inside |= set(flow.ancestors(site.nodes.key_source, stop=partial(operator.is_, site.nodes.source)))
    return inside


def _linears_of(site: Site) -> tuple[Node | None, ...]:
    if isinstance(site, AttentionSite):
        return (*site.nodes.linears, site.nodes.out_proj)
    return (site.first, site.second) if isinstance(site, MlpSite) else ()
