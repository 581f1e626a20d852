"""Why queries are not the tokens of a map, in words: the reason that an attention could not be read."""

from __future__ import annotations

import math

from torch.fx import Node

from ...graph.dataflow import Dataflow
from ...graph.values import operator_name, shape_of
from ...lift.mixture import Core

_NORMS = "only norms of the head vectors, learned scales of the heads and rotations of whole maps are read there"


def why_unread(core: Core, linear: Node, above: list[Node], flow: Dataflow) -> str:
    """The reason, of a core whose queries are more, fewer or others than the tokens that ``linear`` projects.

    Args:
        above: what acts on the operands after their projections, nearest to the core first.
    """
    extents = dict(zip(core.query.axes, shape_of(core.query.node), strict=True))
    queries, dim = extents["x"], extents["d"]
    projected = shape_of(linear)
    batch = shape_of(flow.capture.inputs[0])[0]
    tokens = math.prod(projected[:-1]) // batch
    place = flow.capture.enclosing_call([linear]).path or "(root)"
    told = f"{queries} queries of {dim} against the {tokens} tokens that {place} projects"
    joined = [node for node in above if operator_name(node) in ("aten::cat", "aten::stack")]
    if joined:
        shapes = " and ".join(str(list(shape_of(used))) for used in joined[0].all_input_nodes[:3])
        return (
            f"joint attention: {operator_name(joined[0])} joins {shapes} after their projections ({told}); tokens of "
            "several sources have no one map"
        )
    if dim % tokens == 0 and queries <= projected[-1] and queries != tokens:
        return (
            f"attention over channels: its product sums over the tokens ({told}), so no token attends to another and "
            "no map can be cut"
        )
    between = [node for node in above if not flow.is_movement(node) and not flow.is_linear(node)]
    if between:
        names = ", ".join(dict.fromkeys(operator_name(node) for node in between))
        return (
            f"windowed queries and keys are changed by {names} between projection and product ({told}); {_NORMS}. "
            "Attention that is not cut into windows is converted whatever acts there"
        )
    return f"how its queries were grouped could not be read ({told})"
