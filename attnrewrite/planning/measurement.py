"""How far a planned conversion is from the site that it replaces, on the example input."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from ..certify.certificate import TOLERANCE
from ..certify.ends import operands_of
from ..certify.forms import operand_heads_last
from ..certify.query_rows import captured_mixture, sampled_rows
from ..graph.dataflow import Dataflow
from ..graph.values import Values, evaluate
from ..ir.contract import BetweenProjections, Exactness, WholeSite
from ..ir.core import AttentionCore, Operands
from ..ir.sites import AttentionSite, Global, Reduced
from ..numerics.error import relative_error
from ..numerics.head_norm import scale_heads
from .planned_site import PlannedSite


def measure(planned: PlannedSite, flow: Dataflow, values: Values) -> PlannedSite:
    """With the local error of the new modules on the example input, of which ``values`` are known, and the share of
    attention that is lost; an exact conversion has none."""
    site, conversion = planned.site, planned.conversion
    assert conversion is not None
    if conversion.exactness is Exactness.EXACT:
        return planned
    if isinstance(site, AttentionSite):
        if isinstance(conversion, BetweenProjections) and isinstance(site.keys, Global | Reduced):
            return _measure_attention(planned, site, conversion.core.eval(), flow, values)
    elif isinstance(conversion, WholeSite) and conversion.until is None:
        conversion.core.eval()
        return planned.measured_as(error=relative_error(conversion.run(values[site.source]), values[site.result]))
    return planned


def value_of(node: Node, flow: Dataflow, values: Values) -> Tensor:
    """A value of the example input that is known, or that is computed from such."""
    found: Tensor = evaluate([node], values, flow.capture, flow.constants)[node]
    return found


def _measure_attention(
    planned: PlannedSite, site: AttentionSite, core: AttentionCore, flow: Dataflow, values: Values
) -> PlannedSite:
    """On all queries, or on those that certification looks at, and the prefix tokens."""
    if core.operands is Operands.OWN_MAP_TOO:
        return planned
    nodes = site.nodes
    operands = {node: value_of(node, flow, values) for node in operands_of(site)}
    parts = [operand_heads_last(operands[o.node], o, site) for o in (nodes.query, nodes.key, nodes.value)]
    for scale in site.learned_scales:
        parts[0] = scale_heads(parts[0], flow.constants[scale])
    prefix = 0 if site.grid is None else site.grid.prefix_tokens
    rows = sampled_rows(site, flow)
    rows = None if rows is None else rows.with_first(prefix)
    places = torch.arange(parts[0].shape[1]) if rows is None else rows.places
    exact = torch.float64 if parts[0].dtype == torch.float64 else None
    expected = operand_heads_last(captured_mixture(site, flow, operands, rows, exact), nodes.output, site)
    if core.operands is Operands.TOKENS:
        actual = core(parts[0], pixels=values[site.source])
        return planned.measured_as(error=relative_error(actual[:, places], expected))
    bias = () if site.bias is None else (site.bias.values[None].to(parts[0].dtype),)
    actual = core(*parts, *bias)[:, places]
    measured = planned.measured_as(error=relative_error(actual, expected))
    if prefix:
        moved = relative_error(actual[:, :prefix], expected[:, :prefix])
        keeps = moved <= TOLERANCE.get(expected.dtype, 8 * torch.finfo(expected.dtype).eps)
        measured = replace(measured, keeps_prefix=keeps)
    seen = core.seen(places)
    if seen is None:
        return measured
    return measured.measured_as(dropped_mass=_dropped_mass(site, parts[0][:, places], parts[1], places, seen))


def _dropped_mass(site: AttentionSite, query: Tensor, key: Tensor, places: Tensor, seen: Tensor) -> list[float]:
    """Of every head: the mean, over the queries at ``places``, of the attention paid to keys that are not ``seen``
    ``[queries, keys]``."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key).float() * site.scale_of_operands
    if site.bias is not None:
        scores = scores + site.bias.values[:, places].to(scores)
    dropped = (scores.softmax(-1) * ~seen.to(scores.device)).sum(-1)
    return [round(float(mass), 6) for mass in dropped.mean(dim=(0, 2))]
