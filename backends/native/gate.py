"""The convolutional gate by the native kernels; see ``csrc/operators.h``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...operators import ConvGluProblem
from .library import kernels

Gradients = tuple[Tensor | None, ...]


def conv_glu(problem: ConvGluProblem) -> tuple[Tensor]:
    """The gated map; see ``attnrewrite.operators.conv_glu``."""
    return (kernels().conv_glu(*_arguments(problem)),)


def conv_glu_backward(
    problem: ConvGluProblem, results: tuple[Tensor, ...], gradients: Gradients, wanted: tuple[bool, ...]
) -> Gradients:
    """Gradients of its operands, in float32."""
    (gradient,) = gradients
    assert gradient is not None  # of one result
    gate, weight, bias, value = kernels().conv_glu_backward(_channels_last(gradient), wanted, *_arguments(problem))
    found = (gate, weight.permute(2, 0, 1).unsqueeze(1) if wanted[1] else None, bias, value)
    operands = problem.operands
    return tuple(
        each if wants and operand is not None else None
        for each, wants, operand in zip(found, wanted, operands, strict=True)
    )


def _arguments(problem: ConvGluProblem) -> tuple[Any, ...]:
    weight = problem.weight.squeeze(1).permute(1, 2, 0).float().contiguous()
    bias = None if problem.bias is None else problem.bias.float().contiguous()
    value = None if problem.value is None else _channels_last(problem.value)
    return _channels_last(problem.gate), weight, bias, value, problem.activation, problem.pre_activation


def _channels_last(tensor: Tensor) -> Tensor:
    """With channels that are neighbors in memory, as the kernels ask."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
