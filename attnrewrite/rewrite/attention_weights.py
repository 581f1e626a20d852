"""Attention weights that a module returns beside its result: the donor's are not those of a new operator."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import fx
from torch.fx import Node

from ..errors import ConversionError
from ..ir import AttentionSite
from .outline import Outlined


class Unavailable:
    """Stands where a converted module would return attention weights; any use of it says why it has none."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # copying, pickling and inspection ask for these
        self._refuse()

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConversionError(
            "this module's attention was converted, and the new operator does not give attention weights; leave the "
            "module unconverted with `keep`, or revert the model, to look at them"
        )


def unavailable() -> Unavailable:
    return Unavailable()


def withhold(outlined: Outlined, site: AttentionSite) -> None:
    """Put a stand-in where the module returns the weights that the site's old product with the values was fed."""
    weights = _weights_of(site)
    returned = {made for node in weights for made in outlined.made.get(node, [])}
    output = next(node for node in outlined.graph.nodes if node.op == "output")
    if not returned & set(output.all_input_nodes):
        return
    with outlined.graph.inserting_before(output):
        stand_in = outlined.graph.call_function(unavailable)
    output.args = fx.node.map_arg(output.args, lambda node: stand_in if node in returned else node)


def _weights_of(site: AttentionSite) -> set[Node]:
    """What lies between the product of query and key and that with the values."""
    found: set[Node] = set()
    pending = [node for node in site.nodes.output.node.all_input_nodes if node is not site.nodes.value.node]
    while pending:
        node = pending.pop()
        if node is site.nodes.product or node in found or node.op != "call_function":
            continue
        found.add(node)
        pending += node.all_input_nodes
    return found
