"""Local attention by the native kernels; see ``csrc/operators.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...operators import LocalProblem
from ...operators.index_rule import CLAMP
from .library import kernels

Gradients = tuple[Tensor | None, ...]


def local_attention(problem: LocalProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see ``attnrewrite.operators.local_attention``."""
    output, lse = kernels().local_attention(*_arguments(problem))
    return output, lse


def local_attention_backward(
    problem: LocalProblem, results: tuple[Tensor, ...], gradients: Gradients, wanted: tuple[bool, ...]
) -> Gradients:
    """Gradients of its operands, in float32."""
    pairs = zip(results, gradients, strict=True)
    arrived = (torch.zeros_like(result) if gradient is None else gradient for result, gradient in pairs)
    found = kernels().local_attention_backward(*arrived, *_arguments(problem))
    return tuple(each if wants else None for each, wants in zip(found, wanted, strict=True))


def _arguments(problem: LocalProblem) -> tuple[Any, ...]:
    query, key, value, bias, *rest = problem.operands
    table = None if bias is None else bias.float().contiguous()
    slides = problem.boundary == CLAMP
    return (query, key, value, table, *rest, problem.kernel_size, problem.dilation, slides, problem.scale)
