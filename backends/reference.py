"""The reference: the plain form of an operator in float64, whatever the dtype of its operands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.backend import Backend, Request
from ..operators.problem import Problem
from . import plain

SLOWER_THAN_PLAIN = 4.0


def forward(problem: Problem) -> tuple[Tensor, ...]:
    """The results, in the dtypes that the operator promises."""
    promised = problem.empty_results()
    return tuple(found.to(like.dtype) for found, like in zip(_widened(problem).plain(), promised, strict=True))


def backward(
    problem: Problem, results: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the operands, in float64."""
    wide = tuple(None if gradient is None else gradient.double() for gradient in gradients)
    return plain.backward(_widened(problem), results, wide, wanted)


def cost(request: Request) -> float:
    """Modelled seconds: it is chosen where nothing else is."""
    return SLOWER_THAN_PLAIN * plain.cost(request)


def _widened(problem: Problem) -> Problem:
    return problem.with_operands([None if each is None else each.to(torch.float64) for each in problem.operands])


REFERENCE = Backend("reference", plain.EveryOperator(forward, backward), cost, devices=("cpu", "cuda"))
