"""What runs where: which backend every operator of a model would run on, and why not on the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from ..capture import example_inputs_for, normalize_inputs, traced_graph
from ..errors import BackendError
from ..operators.backend import Request
from ..operators.dispatch import refusals, select_backend
from ..operators.operator import REGISTERED
from ..operators.problem import Problem, TensorSpec
from ..reports.names import folded_name, numberless
from ..reports.tables import aligned


@dataclass(frozen=True)
class LoweredCall:
    """One call of an operator.

    Attributes:
        module: path of the module whose forward calls it.
        operator: its name.
        grid: shape of its first operand.
        backend: that it would run on; None where none can.
        refusals: for every backend why it cannot run it, or None where it can.
    """

    module: str
    operator: str
    grid: tuple[int, ...]
    backend: str | None
    refusals: dict[str, str | None]


@dataclass(frozen=True)
class LoweringReport:
    """The calls of a model's operators, in the order in which they run; print it."""

    calls: tuple[LoweredCall, ...]
    training: bool

    def __str__(self) -> str:
        if not self.calls:
            return "no operator of attnrewrite is called: convert the model, or build one of attnrewrite.models"
        columns = ("module", "calls", "operator", "first operand", "backend")
        lines = [f"Backends in {'training' if self.training else 'inference'}", ""]
        return "\n".join([*lines, *aligned(columns, list(self._rows())), "", *self._reasons()])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for alike in _alike(self.calls):
            first = alike[0]
            shape = "x".join(map(str, first.grid))
            name = folded_name([call.module for call in alike])
            yield name, str(len(alike)), first.operator, shape, first.backend or "none can run it"

    def _reasons(self) -> Iterator[str]:
        """Why backends do not run an operator, each reason once."""
        told: dict[str, None] = {}
        for call in self.calls:
            for backend, reason in call.refusals.items():
                if reason is not None:
                    told[f"{backend} does not run {call.operator}: {reason}"] = None
        yield from told


def explain_lowering(model: nn.Module, example_inputs: Any = None, *, training: bool = False) -> LoweringReport:
    """Say for every call of this library's operators in a model which backend would run it, and why not the others.

    The choice is that of a call now, in this context: ``attnrewrite.lowering.use_backend``, ``autotune`` and the
    environment variables count. The model is traced, and stays as it is.

    Args:
        model: any model.
        example_inputs: as for ``convert``; the choice depends on their shapes, dtype and device.
        training: ask for backends that also run the backward.

    Raises:
        CaptureError: the model cannot be traced.
        ArgumentError: there are no example inputs, and none can be derived.
    """
    inputs = normalize_inputs(model, example_inputs_for(model) if example_inputs is None else example_inputs)
    calls = []
    for node in traced_graph(model, inputs, training).nodes:
        if (problem := _problem(node)) is not None:
            *_, (module, _class) = node.meta["nn_module_stack"].values()
            calls.append(_lowered(module, Request(problem, needs_gradient=training)))
    return LoweringReport(tuple(calls), training)


def _problem(node: Node) -> Problem | None:
    """The problem that a call in a graph states, of specs; None for other nodes."""
    name, _, _overload = str(node.target).rpartition(".")
    operator = REGISTERED.get(name.replace(".", "::"))
    if node.op != "call_function" or operator is None:
        return None
    arguments = [TensorSpec.of(each.meta["val"]) if isinstance(each, Node) else each for each in node.args]
    problem: Problem = operator.problem_of(arguments)
    return problem


def _lowered(module: str, request: Request) -> LoweredCall:
    try:
        backend = select_backend(request).name
    except BackendError:
        backend = None
    first: Any = request.problem.operands[0]
    return LoweredCall(module, request.operator, first.shape, backend, refusals(request))


def _alike(calls: Iterable[LoweredCall]) -> Iterable[list[LoweredCall]]:
    """Calls that differ in nothing but the numbers in their modules' names, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[LoweredCall]] = {}
    for call in calls:
        key = numberless(call.module), call.operator, call.grid, call.backend
        groups.setdefault(key, []).append(call)
    return groups.values()
