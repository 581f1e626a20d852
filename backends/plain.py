"""Every operator by its plain form, in the dtype and on the device of its operands; the backward by torch's autograd.

It serves what no faster backend takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..operators.backend import Backend, Implementation, Request
from ..operators.problem import Problem

SECONDS_PER_MAC = 1.2e-9


class EveryOperator(Mapping[str, Implementation]):
    """One forward and one backward for whatever operator there is, also for those that others define."""

    def __init__(self, forward: Implementation, backward: Implementation) -> None:
        self._forward, self._backward = forward, backward

    def __getitem__(self, name: str) -> Implementation:
        return self._backward if name.endswith("_backward") else self._forward

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def forward(problem: Problem) -> tuple[Tensor, ...]:
    """The results."""
    return problem.plain()


def backward(
    problem: Problem, results: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the operands; the results are computed afresh."""
    operands: list[Any] = [
        operand.detach().requires_grad_() if operand is not None and wants else operand
        for operand, wants in zip(problem.operands, wanted, strict=True)
    ]
    sources = [operand for operand, wants in zip(operands, wanted, strict=True) if operand is not None and wants]
    with torch.enable_grad(), _autograd_inside_an_operator():
        computed = problem.with_operands(operands).plain()
        found = iter(_gradients(computed, gradients, sources))
    pairs = zip(operands, wanted, strict=True)
    return tuple(next(found) if operand is not None and wants else None for operand, wants in pairs)


def _gradients(
    results: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], sources: list[Tensor]
) -> tuple[Tensor, ...]:
    """Zeros where no result with a gradient depends on a source, as a log-sum-exp does not on values."""
    pairs = zip(results, gradients, strict=True)
    arrived = [(result, gradient) for result, gradient in pairs if gradient is not None and result.requires_grad]
    if not arrived:
        return tuple(map(torch.zeros_like, sources))
    depending, arriving = zip(*arrived, strict=True)
    return torch.autograd.grad(depending, sources, arriving, materialize_grads=True)


def _autograd_inside_an_operator() -> AbstractContextManager[None]:
    """The dispatcher excludes autograd while it runs an operator, and ``torch.func`` fails there under a mode that
    counts or checks what is dispatched."""
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    return guard


def cost(request: Request) -> float:
    """Modeled seconds: of a window's elementwise products, whose memory traffic dominates; others cost less."""
    problem = request.problem
    return SECONDS_PER_MAC * (problem.backward_macs() if request.backward else problem.macs())


PLAIN = Backend("plain", EveryOperator(forward, backward), cost, is_plain=True)
