"""What every form of an attention site is described by: its nodes, its head axes, the module it is in."""

from __future__ import annotations

from torch.fx import Node

from ...graph.dataflow import Dataflow
from ...ir.sites import AttentionNodes, Placement
from ...lift.mixture import Core
from ...lift.projections import Projected, group_sizes
from .output_projection import OutProj


def attention_nodes(
    core: Core,
    head_groups: str,
    source: Node,
    key_source: Node | None,
    out_proj: OutProj | None,
    batch_axis: int,
    linears: tuple[Node, ...],
    placement: Placement | None = None,
) -> AttentionNodes:
    return AttentionNodes(
        core.query, core.key, core.value, core.output, core.product, core.groups, head_groups, source, key_source,
        out_proj.linear if out_proj else None, out_proj.result if out_proj else None, batch_axis, linears,
        placement, core.weights,
    )  # fmt: skip


def head_groups_of(core: Core, *parts: Projected) -> str:
    """The group axes along which the weight rows change."""
    sizes = group_sizes(core)
    axes = []
    for position, axis in enumerate(core.groups):
        rows = [part.channel.view(*sizes, -1) for part in parts]
        if any(bool((row != row.narrow(position, 0, 1)).any()) for row in rows) or len(core.groups) == 1:
            axes.append(axis)
    return "".join(axes) or core.groups[-1:]


def path_of(flow: Dataflow, nodes: list[Node]) -> str:
    return flow.capture.enclosing_call(nodes).path
