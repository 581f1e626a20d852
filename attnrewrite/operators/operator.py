"""A ``Problem`` as an operator of torch: called, traced, differentiated, counted.

``Operator(LocalProblem)`` registers ``attnrewrite::local_attention``, which takes the operands, the geometry and the
name of a backend, and ``attnrewrite::local_attention_backward``, which takes the gradients of the results (None where
none arrives), which operands' gradients are wanted, the operands, the results and the geometry, and returns a gradient
for every operand, empty where it is absent or not wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.library import CustomOpDef
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .backend import Request
from .dispatch import run, run_backward, run_on, select_backend
from .problem import Problem, TensorSpec, schema_arguments

P = TypeVar("P", bound=Problem)


REGISTERED: dict[str, Operator[Any]] = {}
"""Every operator by its qualified name, such as ``attnrewrite::local_attention``."""

_spelled_out: ContextVar[tuple[type[Problem], ...] | None] = ContextVar("attnrewrite_spelled_out", default=None)


@contextmanager
def spelled_out(but: tuple[type[Problem], ...] = ()) -> Iterator[None]:
    """Graphs that are traced inside hold the plain forms of the operators in the place of calls, so that their parts
    can be recognised; those of the problems ``but`` stay calls."""
    token = _spelled_out.set(but)
    try:
        yield
    finally:
        _spelled_out.reset(token)


class _Context(Protocol):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    geometry: tuple[Any, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


_plain_forms: dict[OpOverload[Any, Any], Callable[..., Any]] = {}


def plain_decompositions() -> dict[OpOverload[Any, Any], Callable[..., Any]]:
    """Every operator by its plain form, for ``torch.export.ExportedProgram.run_decompositions``.

    A program keeps operators whole. One that goes on to a format that knows none of them, as ONNX, is decomposed first.
    """
    return dict(_plain_forms)


class Operator(Generic[P]):
    """The operator of a class of problems, in a namespace of ``torch.ops``.

    Attributes:
        forward, backward: the two as ``torch.library`` knows them.
    """

    def __init__(self, problem: type[P], namespace: str = "attnrewrite") -> None:
        self.problem, self._operands, self._results = problem, len(problem.operand_names), len(problem.results)
        operands, geometry = schema_arguments(problem)
        geometry = f"{geometry}, str backend" if geometry else "str backend"
        gradients = ", ".join(f"Tensor? grad_{name}" for name in problem.results)
        results = ", ".join(f"Tensor {name}" for name in problem.results)
        self.forward = _registered(
            f"{namespace}::{problem.name}", self._run,
            f"({operands}, {geometry}) -> ({_tensors(self._results)})",
        )  # fmt: skip
        self.backward = _registered(
            f"{namespace}::{problem.name}_backward", self._run_backward,
            f"({gradients}, bool[] wanted, {operands}, {results}, {geometry}) -> ({_tensors(self._operands)})",
        )  # fmt: skip
        self.forward.register_fake(self._fake)
        self.backward.register_fake(self._fake_backward)
        self.forward.register_autograd(self._differentiate, setup_context=self._save)
        REGISTERED[f"{namespace}::{problem.name}"] = self
        packets = getattr(torch.ops, namespace)
        _plain_forms[getattr(packets, problem.name).default] = self._run_plain
        register_flop_formula(getattr(packets, problem.name))(self._flops)
        register_flop_formula(getattr(packets, f"{problem.name}_backward"))(self._backward_flops)

    def __call__(self, problem: P, backend: str | None = None) -> tuple[Tensor, ...]:
        """The results of a problem, its operands cast as autocast casts them.

        Args:
            problem: the call; it is checked.
            backend: the name of one of ``attnrewrite.lowering.available_backends()``; None chooses.

        Raises:
            ArgumentError: operands and geometry do not fit each other.
            BackendError: the backend is unknown or cannot run this, or none can.
        """
        problem = problem.autocast()
        problem.check()
        if torch.onnx.is_in_onnx_export():
            return problem.plain()
        if torch.compiler.is_compiling():
            if _is_spelled_out(problem):
                return problem.plain()
            name = backend or ""  # a traced graph chooses when it runs
        elif _wants_plain(problem):
            return problem.plain()
        else:  # now, so that forward and backward agree
            request = Request.of(problem, needs_gradient=_needs_gradient(problem))
            chosen = select_backend(request, backend)
            if chosen.is_plain and problem.records_plain and request.needs_gradient:
                return problem.plain()
            if not request.needs_gradient and not _is_watched(problem):
                return tuple(result.contiguous() for result in run_on(chosen, request, problem))
            name = chosen.name
        found = self.forward(*problem.operands, *problem.geometry, name)
        return found if isinstance(found, tuple) else (found,)

    def problem_of(self, arguments: Sequence[Any]) -> P:
        """The problem that a call's flat arguments state, tensors or what stands for them."""
        return self.problem.of(arguments[: self._operands], arguments[self._operands : -1])

    def _run(self, *flat: Any) -> Any:
        problem = self.problem_of(flat)
        return _returned(result.contiguous() for result in run(problem, flat[-1]))

    def _run_plain(self, *flat: Any) -> Any:
        return _returned(result.contiguous() for result in self.problem_of(flat).plain())

    def _run_backward(self, *flat: Any) -> Any:
        gradients, wanted, problem, results = self._split(flat[:-1])
        found = run_backward(problem, results, gradients, wanted, flat[-1])
        return _returned(
            _nothing(problem) if operand is None or gradient is None or not wants
            else gradient.to(operand.dtype).contiguous()
            for operand, gradient, wants in zip(problem.operands, found, wanted, strict=True)
        )  # fmt: skip

    def _split(self, flat: Sequence[Any]) -> tuple[tuple[Tensor | None, ...], tuple[bool, ...], P, tuple[Tensor, ...]]:
        """Gradients of the results, whose gradients are wanted, the problem, and its results."""
        results, operands = self._results, self._operands
        gradients, wanted, rest = flat[:results], flat[results], flat[results + 1 :]
        problem = self.problem.of(rest[:operands], rest[operands + results :])
        return tuple(gradients), tuple(wanted), problem, tuple(rest[operands : operands + results])

    def _fake(self, *flat: Any) -> Any:
        return _returned(self.problem_of(flat).empty_results())

    def _fake_backward(self, *flat: Any) -> Any:
        _gradients, wanted, problem, _results = self._split(flat[:-1])
        return _returned(
            _nothing(problem) if operand is None or not wants else operand.new_empty(operand.shape)
            for operand, wants in zip(problem.operands, wanted, strict=True)
        )

    def _save(self, ctx: _Context, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # no gradient at the statistics is the common case, and a cheaper one
        ctx.save_for_backward(*inputs[: self._operands], *(output if isinstance(output, tuple) else (output,)))
        ctx.geometry = inputs[self._operands :]

    def _differentiate(self, ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing gives them a single time
        operands, results = saved[: self._operands], saved[self._operands :]
        wanted = [bool(needed) for needed in ctx.needs_input_grad[: self._operands]]
        rest = (None,) * len(ctx.geometry)
        if all(gradient is None for gradient in gradients):
            return (*(None for _ in wanted), *rest)
        if torch.is_grad_enabled():  # these gradients are to be differentiated again
            problem = self.problem.of(operands, ctx.geometry[:-1])
            return (*_plain_gradients(problem, gradients, wanted), *rest)
        found: Any = self.backward(*gradients, wanted, *operands, *results, *ctx.geometry)
        return (*(each if wants else None for each, wants in zip(found, wanted, strict=True)), *rest)

    def _flops(self, *shapes: Any, **_: Any) -> int:
        return 2 * self.problem_of(_specs(shapes)).macs()

    def _backward_flops(self, *shapes: Any, **_: Any) -> int:
        flat = [*shapes[: self._results + 1], *_specs(shapes[self._results + 1 :])]
        return 2 * self._split(flat[:-1])[2].backward_macs()


def _is_watched(problem: Problem) -> bool:
    """Whether something has to see the operator itself: counters, tracers, and tensors that are more than numbers.

    Where nothing does, and no gradient is wanted, torch's dispatcher would only cost time: on small maps as much as the
    kernel.
    """
    if _get_current_dispatch_mode() is not None:
        return True
    return any(
        each is not None and (each.is_meta or type(each) not in (Tensor, nn.Parameter)) for each in problem.operands
    )


def _is_spelled_out(problem: Problem) -> bool:
    """Whether a graph is to hold its plain form; dynamo, which cannot read a context, is never asked for that."""
    if torch.compiler.is_dynamo_compiling():
        return False
    kept = _spelled_out.get()
    return kept is not None and not isinstance(problem, kept)


def _registered(name: str, function: Any, schema: str) -> CustomOpDef:
    return torch.library.custom_op(name, function, mutates_args=(), schema=schema)


def _returned(tensors: Iterable[Tensor]) -> Any:
    """As torch's schemas have it: one tensor is no tuple."""
    each = tuple(tensors)
    return each[0] if len(each) == 1 else each


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _specs(shapes: Sequence[Any]) -> list[Any]:
    """Shapes as specs; a counter hands over tensors as ``torch.Size``, numbers as they are."""
    return [TensorSpec(tuple(each)) if isinstance(each, torch.Size) else each for each in shapes]


def _nothing(problem: Problem) -> Tensor:
    first = problem.operands[0]
    assert first is not None
    return first.new_empty(0)


def _plain_gradients(
    problem: Problem, gradients: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated, through the plain form."""
    pairs = zip(problem.plain(), gradients, strict=True)  # a log-sum-exp does not depend on values
    arrived = [(result, gradient) for result, gradient in pairs if gradient is not None and result.requires_grad]
    if not arrived:
        return (None,) * len(wanted)
    sources = [
        operand for operand, wants in zip(problem.operands, wanted, strict=True) if wants and operand is not None
    ]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in arrived], sources, [grad for _, grad in arrived],
            create_graph=True, materialize_grads=True,
        )
    )  # fmt: skip
    return tuple(
        next(found) if wants and operand is not None else None
        for operand, wants in zip(problem.operands, wanted, strict=True)
    )


def _needs_gradient(problem: Problem) -> bool:
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in problem.operands)


def _wants_plain(problem: Problem) -> bool:
    """Is it called where an opaque operator would lose what plain operations can do?

    Under ``torch.func`` transforms and forward-mode derivatives, and ``torch.jit.trace``.
    """
    if torch.jit.is_tracing():
        return True
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(each) or forward_ad.unpack_dual(each).tangent is not None
        for each in problem.operands
        if each is not None
    )
