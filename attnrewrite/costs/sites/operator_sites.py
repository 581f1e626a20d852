"""Sites whose attention is one of this library's operators, called by whatever module."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch.fx import Node

from ...graph.dataflow import Dataflow
from ...graph.values import shape_of
from ...operators import GroupedProblem, LocalProblem
from ...operators.biased_attention import MAP_AXES
from ...operators.index_rule import CLAMP
from ...operators.operator import REGISTERED
from ...operators.problem import TensorSpec


@dataclass(frozen=True)
class OperatorSite:
    """A call of an attention operator on a map between its linear maps; ``problem`` has shapes alone."""

    name: str
    node: Node
    source: Node
    end: Node
    linears: tuple[Node, ...]
    width: int
    problem: LocalProblem | GroupedProblem
    kind = "attention"

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.problem.grid
        return height, width

    @property
    def prefix_tokens(self) -> int:
        """Tokens beside those of the map, which every query sees."""
        return self.problem.additional

    def describe(self) -> str:
        local = isinstance(self.problem, LocalProblem)
        kernel = self.problem.kernel_size if isinstance(self.problem, LocalProblem) else self.problem.window_size
        prefix = f"+{self.prefix_tokens}" if self.prefix_tokens else ""
        _batch, heads, head_dim, _value_dim = self.problem.sizes
        keys = f"{'neighborhood' if local else 'blocks'}({'x'.join(map(str, kernel))})"
        return f"attention grid {self.size[0]}x{self.size[1]}{prefix} heads {heads}x{head_dim} keys {keys}"


def operator_sites(flow: Dataflow) -> list[OperatorSite]:
    """Every such call on a map whose query comes from a linear map."""
    calls = flow.nodes("attnrewrite::local_attention", "attnrewrite::grouped_attention")
    return [site for node in calls if (site := _read(node, flow)) is not None]


def _read(node: Node, flow: Dataflow) -> OperatorSite | None:
    operands = [operand for operand in node.args[:3] if isinstance(operand, Node)]
    above = [n for operand in operands for n in flow.ancestors(operand, stop=flow.is_linear)]
    linears = tuple(dict.fromkeys(n for n in above if flow.is_linear(n)))
    problem = _stated(node)
    if not linears or len(problem.grid) != MAP_AXES or not _has_formula(problem):
        return None
    source = linears[0].args[0]
    assert isinstance(source, Node)
    name, end = flow.capture.enclosing_call([*linears, node]).path, next_linear(node, flow) or node
    return OperatorSite(name, node, source, end, linears, shape_of(source)[-1], problem)


def _has_formula(problem: LocalProblem | GroupedProblem) -> bool:
    """Neighborhoods with prefix tokens, and windows."""
    if isinstance(problem, LocalProblem):
        return problem.boundary == CLAMP
    return problem.interval == (1, 1) and not problem.rolled and problem.additional == 0


def _stated(node: Node) -> LocalProblem | GroupedProblem:
    """The problem of a call in a graph, of shapes alone."""
    name, _, _overload = str(node.target).rpartition(".")
    arguments = [TensorSpec(shape_of(each)) if isinstance(each, Node) else each for each in node.args]
    problem: LocalProblem | GroupedProblem = REGISTERED[name.replace(".", "::")].problem_of(arguments)
    return problem


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
