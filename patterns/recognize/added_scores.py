"""What is added to the scores of attention, and what is dropped from its weights: by head and by group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import Refusal
from ...graph.dataflow import Dataflow
from ...graph.values import argument, operator_name
from ...ir.sites import Bias
from ...lift.mixture import Core
from ...lift.projections import Grouping, group_sizes


def bias_of_heads(core: Core, grouped: Grouping, flow: Dataflow) -> Bias | None:
    """The learned bias of every head; of one alone if it is the same for all."""
    if core.bias is None:
        return None
    parts, part = _at_groups(core.bias, core, grouped.group_of_head)
    if any(_differ(parts, part[:, 0], other) for other in part.T[1:]):
        raise Refusal("the learned bias differs between windows", "share it across windows")
    values = parts if len(parts) == 1 else parts[part[:, 0]]
    sources = [flow.provenance_of_constant(node) for node in core.addends]
    kind = "dense" if all(source.op == "placeholder" for source in sources) else "mlp"
    return Bias(kind, core.addends, values, tuple(values.shape))


def mask_of_groups(core: Core, grouped: Grouping) -> Tensor | None:
    """The constant mask of every group, ``[groups, queries, keys]``."""
    if core.mask is None:
        return None
    parts, part = _at_groups(core.mask, core, grouped.group_of_head)
    if any(_differ(parts, part[0], other) for other in part[1:]):
        raise Refusal("the mask differs between heads", "use one mask for all heads")
    return parts.expand(part.shape[1], -1, -1) if len(parts) == 1 else parts[part[0]]


def of_groups(values: Tensor, core: Core, groups: Tensor) -> Tensor:
    """``[len(groups), queries, keys]``; one row if it is the same for all."""
    parts, part = _at_groups(values, core, groups)
    return parts if len(parts) == 1 else parts[part]


def _at_groups(values: Tensor, core: Core, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ``[queries, keys]`` parts of a tensor given per group axis, and which of them each group has."""
    distinct = values.shape[:-2]
    part = torch.arange(math.prod(distinct)).view(distinct).expand(group_sizes(core)).flatten()
    return values.flatten(0, -3), part[groups]


def _differ(parts: Tensor, one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other) and not torch.equal(parts[one], parts[other])


def dropout_rate(core: Core) -> float:
    rates = [float(argument(node, 1)) for node in core.nodes if operator_name(node) == "aten::dropout"]
    return max(rates, default=0.0)
