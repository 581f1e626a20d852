"""One run of the captured graph on the example inputs, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graph.dataflow import Dataflow
from ..graph.values import Values, is_call, operator_name, run_node
from ..numerics.draws import same_draws


def collect_values(flow: Dataflow, wanted: set[Node]) -> Values:
    """Run the captured graph once on the example inputs, with the ``same_draws``, and keep the ``wanted`` values."""
    kept: Values = {}
    run_through(flow, wanted, kept.__setitem__)
    return kept


def run_through(flow: Dataflow, wanted: set[Node], found: Callable[[Node, Any], None]) -> None:
    """Run the captured graph once, as ``collect_values`` does, and hand over each ``wanted`` value as it is known.

    Nothing is held longer than the graph needs it: that is for ``found`` to decide.
    """
    capture = flow.capture
    values: Values = dict(flow.constants) | {node: capture.tensors[node] for node in capture.inputs}
    uses = {node: len(node.users) for node in capture.graph.nodes}
    in_place = any(operator_name(n).endswith("_") and n not in flow.constants for n in capture.graph.nodes)
    last = max(wanted, default=None)
    with torch.no_grad(), same_draws(capture.tensors.values()):
        for node in capture.graph.nodes:
            if is_call(node) and node not in flow.constants:
                values[node] = run_node(node, values)
                for used in node.all_input_nodes:
                    uses[used] -= 1
                    if not uses[used] and used not in flow.constants:
                        del values[used]
            if node in wanted:
                found(node, values[node].clone() if in_place else values[node])
            if node is last:
                break
