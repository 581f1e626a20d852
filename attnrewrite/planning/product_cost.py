"""What an attention site's two products cost before and after a conversion, counted on shapes alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UNFORESEEN
from ..graph.values import shape_of
from ..ir.contract import BetweenProjections, Conversion
from ..ir.core import AttentionCore, Operands
from ..ir.sites import AttentionSite, MapGroups
from .plan import Plan
from .planned_site import PlannedSite


def macs_before(site: AttentionSite) -> int:
    """Multiply-adds of query with key and of weights with values, as captured, padding included."""
    extents: dict[str, int] = {}
    for operand in (site.nodes.query, site.nodes.key, site.nodes.value):
        for axis, size in zip(operand.axes, shape_of(operand.node), strict=True):
            extents[axis] = max(size, extents.get(axis, 1))
    widths = extents.pop("d") + extents.pop("e")
    return math.prod(extents.values()) * widths


def macs_after(site: AttentionSite, conversion: Conversion) -> int | None:
    """Multiply-adds of the new core's products, projections of its own apart; None if there is none between the site's
    projections, or none that runs without values."""
    if not isinstance(conversion, BetweenProjections):
        return None
    core = conversion.core
    mixing = copy.deepcopy(core.mixing).to("meta").eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
            dtype = site.nodes.query.node.meta["val"].dtype
            operands = [None if part is None else part.to(dtype) for part in _operands(site, core)]
            local = {name: part.to(dtype) for name, part in _local_operands(site, core).items()}
            mixing(*operands, **local)
    except UNFORESEEN:
        return None
    return counter.get_total_flops() // 2


def count_products(plan: Plan) -> Plan:
    """Note of every site that is converted what its new core costs beside the old products."""
    return replace(plan, sites=tuple(_counted(each) if each.converting else each for each in plan.sites))


def _counted(planned: PlannedSite) -> PlannedSite:
    if not isinstance(planned.site, AttentionSite) or planned.conversion is None:
        return planned
    after = macs_after(planned.site, planned.conversion)
    return planned if after is None else planned.measured_as(macs=(macs_before(planned.site), after))


def _operands(site: AttentionSite, core: AttentionCore) -> list[Tensor | None]:
    batch, nodes = _batch(site), site.nodes
    dims = [dict(zip(part.axes, shape_of(part.node), strict=True)) for part in (nodes.query, nodes.key, nodes.value)]
    widths = [sizes.get("d", sizes.get("e", 1)) for sizes in dims]
    bias: Tensor | None = None
    if isinstance(site.keys, MapGroups):
        grid = site.map_grid
        parts = [torch.empty(batch, grid.height, grid.width, site.heads, width) for width in widths]
        bias = None if site.bias is None else torch.empty(site.heads, *site.bias.values.shape[1:])
        pads = [] if core.padded is None else [torch.empty(site.heads, width) for width in widths[1:]]
        return [*parts, bias, *pads]
    lengths = (dims[0]["x"], dims[1]["y"], dims[1]["y"])
    lengths = (lengths[0],) * 3 if core.operands is Operands.TOKENS else lengths
    parts = [torch.empty(batch, length, site.heads, width) for length, width in zip(lengths, widths, strict=True)]
    if site.bias is not None:
        bias = torch.empty(1, site.heads, lengths[0], lengths[1])
    return [*parts, *([] if bias is None else [bias])]


def _local_operands(site: AttentionSite, core: AttentionCore) -> dict[str, Tensor]:
    if core.operands is not Operands.OWN_MAP_TOO:
        return {}
    grid = site.map_grid
    local = torch.empty(_batch(site), grid.height, grid.width, site.heads, site.head_dim)
    return {"local_key": local, "local_value": local}


def _batch(site: AttentionSite) -> int:
    source = site.nodes.source
    if source is not None:
        return shape_of(source)[site.nodes.batch_axis]
    sizes = dict(zip(site.nodes.query.axes, shape_of(site.nodes.query.node), strict=True))
    return math.prod(sizes[axis] for axis in site.nodes.groups if axis in sizes) // site.heads
