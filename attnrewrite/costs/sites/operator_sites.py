"""Sites whose attention is one of this library's operators, called by whatever module."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch.fx import Node

from ...graph.dataflow import Dataflow
from ...graph.values import shape_of


@dataclass(frozen=True)
class OperatorSite:
    """A call of ``local_attention`` (``shift`` None) or ``grouped_attention`` between its linear maps."""

    name: str
    node: Node
    source: Node
    end: Node
    linears: tuple[Node, ...]
    size: tuple[int, int]
    heads: int
    head_dim: int
    width: int
    kernel_size: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    shift: tuple[int, int] | None = None
    padding_keys: bool = False
    prefix_tokens: int = 0
    kind = "attention"

    def describe(self) -> str:
        form = "neighborhood" if self.shift is None else "blocks"
        sides = f"{self.size[0]}x{self.size[1]}"
        prefix = f"+{self.prefix_tokens}" if self.prefix_tokens else ""
        kernel = "x".join(map(str, self.kernel_size))
        return f"attention grid {sides}{prefix} heads {self.heads}x{self.head_dim} keys {form}({kernel})"


def operator_sites(flow: Dataflow) -> list[OperatorSite]:
    """Every such call on a map whose query comes from a linear map."""
    calls = flow.nodes("attnrewrite::local_attention", "attnrewrite::grouped_attention")
    return [site for node in calls if (site := _read(node, flow)) is not None]


def _read(node: Node, flow: Dataflow) -> OperatorSite | None:
    operands = [operand for operand in node.args[:3] if isinstance(operand, Node)]
    above = [n for operand in operands for n in flow.ancestors(operand, stop=flow.is_linear)]
    linears = tuple(dict.fromkeys(n for n in above if flow.is_linear(n)))
    shape = shape_of(operands[0])
    if not linears or len(shape) != 5:
        return None
    source = linears[0].args[0]
    assert isinstance(source, Node)
    end = next_linear(node, flow) or node
    size, kernel = (shape[1], shape[2]), _pair(node.args[6])
    local = "local_attention" in str(node.target)
    extra = node.args[4]
    prefix = shape_of(extra)[1] if local and isinstance(extra, Node) else 0
    return OperatorSite(
        name=flow.capture.enclosing_call([*linears, node]).path,
        node=node, source=source, end=end, linears=linears, size=size, heads=shape[3], head_dim=shape[4],
        width=shape_of(source)[-1], kernel_size=kernel, dilation=_pair(node.args[8]) if local else (1, 1),
        shift=None if local else _pair(node.args[7]), padding_keys=not local and extra is not None,
        prefix_tokens=prefix,
    )  # fmt: skip


def next_linear(node: Node, flow: Dataflow) -> Node | None:
    """The nearest linear map that a value feeds."""
    pending, seen = deque([node]), {node}
    while pending:
        for user in pending.popleft().users:
            if flow.is_linear(user):
                return user
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return None


def _pair(values: object) -> tuple[int, int]:
    assert isinstance(values, list | tuple)
    return values[0], values[1]
