"""Sites of converted models: calls of the cores that conversions install, between their linear maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ...algebra.core_formula import is_costed
from ...capture import Capture, ModuleCall, NodeRef
from ...graph.dataflow import Dataflow
from ...graph.values import shape_of
from ...ir.core import AttentionCore
from ...ir.sites import Grid
from ..count.declared import map_given
from .operator_sites import next_linear


@dataclass(frozen=True)
class CoreSite:
    """A call of a core of attention; ``grid`` is the map of its queries, ``keys`` the number of its keys' tokens."""

    name: str
    call: ModuleCall
    module: AttentionCore
    query: Node
    source: Node
    end: Node
    linears: tuple[Node, ...]
    grid: Grid
    keys: int
    heads: int
    head_dim: int
    width: int
    kind = "attention"

    def describe(self) -> str:
        return f"attention grid {self.grid} heads {self.heads}x{self.head_dim} {type(self.module).__name__}"


def core_sites(capture: Capture, flow: Dataflow) -> list[CoreSite]:
    """Every call, in ``capture``'s model, of a core that states its cost and whose operands come from linear maps.

    Of a core around another it is the inner one. A core that is given no map is left to the recognizers.
    """
    found = (_read(call, module, flow) for call, module in _innermost(flow.capture.root, capture))
    return [site for site in found if site is not None]


def _innermost(call: ModuleCall, capture: Capture) -> list[tuple[ModuleCall, AttentionCore]]:
    """Calls of cores that state their cost, with no other such call inside."""
    inside = [found for child in call.children for found in _innermost(child, capture)]
    module = capture.module_of(call)
    return inside or ([(call, module)] if is_costed(module) and isinstance(module, AttentionCore) else [])


def _read(call: ModuleCall, module: AttentionCore, flow: Dataflow) -> CoreSite | None:
    operands = [_node(call.arguments[name]) for name in ("query", "key", "value")]
    result = _node(call.output)
    if result is None or any(operand is None for operand in operands):
        return None
    query, key, _ = operands
    assert query is not None
    assert key is not None
    above = [n for operand in operands if operand for n in flow.ancestors(operand, stop=flow.is_linear)]
    linears = tuple(dict.fromkeys(n for n in above if flow.is_linear(n)))
    if not linears:
        return None
    first = min(linears)
    source = first.args[0]
    assert isinstance(source, Node)
    shape = shape_of(query)
    local = _node(call.arguments.get("local_key"))
    grid = map_given(module, shape, None if local is None else shape_of(local))
    if grid is None:
        return None
    return CoreSite(
        name=flow.capture.enclosing_call([*linears, result]).path,
        call=call, module=module, query=query, source=source, end=next_linear(result, flow) or result,
        linears=linears, grid=grid,
        keys=grid.tokens if len(shape) == 5 else shape_of(key)[1], heads=shape[-2], head_dim=shape[-1],
        width=shape_of(source)[-1],
    )  # fmt: skip


def _node(reference: object) -> Node | None:
    return reference.node if isinstance(reference, NodeRef) else None
