"""Replace sites in a captured graph itself, without any module of a model: what a compiler's backend runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from torch.fx import Node

from ..graph.dataflow import Dataflow
from ..ir.contract import Conversion
from ..ir.sites import Site
from .dead_code import remove_dead_code
from .editable import Editable
from .install import install


def replaced_in_graph(flow: Dataflow, sites: list[Site], conversions: Mapping[int, Conversion]) -> fx.GraphModule:
    """The captured graph with ``sites`` as their ``conversions``, by ``id``, have them. It takes the inputs and the
    values that the model holds, in the order of their placeholders, and its cores are its only modules. The captured
    graph stays.

    Raises:
        Refusal: a site's values are not where the graph can replace them.
    """
    graph, copies = fx.Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(flow.capture.graph, copies))
    edited = Editable(graph, flow.capture, {node: [copied] for node, copied in copies.items()})
    _hold_constants(edited)
    for site in reversed(sites):  # from the last: what is replaced is then no source of what follows
        install(edited, site, conversions[id(site)])
    remove_dead_code(graph)
    graph.lint()
    return fx.GraphModule({**edited.modules, **edited.constants}, graph)


def _hold_constants(edited: Editable) -> None:
    """Tensors that are neither given nor the model's go with the graph."""
    capture = edited.capture
    for node in (each for each in capture.tensors if each not in capture.names and each not in capture.inputs):
        placeholder = edited.first(node)
        with edited.graph.inserting_before(placeholder):
            held = edited.add_constant(capture.tensors[node])
        held.meta = placeholder.meta
        placeholder.replace_all_uses_with(held)
        edited.graph.erase_node(placeholder)
        edited.made[node] = [held]
