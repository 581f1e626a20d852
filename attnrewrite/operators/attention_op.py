"""What the attention operators share: their description to backends, their fakes, their autograd formula.

Such an operator takes six tensors (query, key, value and three optional ones), then its geometry, and returns the
output and the log-sum-exp. Its backward operator takes the gradients of both results, the tensors, both results and the
geometry, and returns six gradients, empty ones for absent tensors (where a backend may return anything).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

from ..numerics.precision import accumulation_dtype
from .dispatch import Request

OPERANDS = 6
Shape = Sequence[int]


class _Context(Protocol):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    geometry: tuple[Any, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def attention_request(operator: str, query: Tensor, value: Tensor, window: tuple[int, ...], **rest: Any) -> Request:
    """Describe a call to the backends; ``rest`` are further fields of ``Request``."""
    return Request(
        operator=operator,
        device=query.device.type,
        dtype=query.dtype,
        batch=query.shape[0],
        grid=tuple(query.shape[1:-2]),
        heads=query.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        window=window,
        **rest,
    )


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Results as the fakes promise them."""
    return tuple(tensor.contiguous() for tensor in tensors)


def gradients_of(operands: tuple[Tensor | None, ...], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a backend found, as the fakes promise it: in each operand's dtype, and empty for absent ones."""
    absent = found[0].new_empty(0)
    return tuple(
        torch.empty_like(absent) if operand is None else gradient.to(operand.dtype).contiguous()
        for operand, gradient in zip(operands, found, strict=True)
    )


def make_differentiable(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register the fakes of an operator and of its backward operator, and join the two for autograd."""
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)

    def differentiate(ctx: _Context, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.geometry)
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(gradient if needs else None for gradient, needs in needed), *(None for _ in ctx.geometry))

    forward.register_autograd(differentiate, setup_context=_save_operands)


def register_flops(forward: OpOverloadPacket, backward: OpOverloadPacket, pairs: Callable[..., int]) -> None:
    """Tell torch's counters what the two operators cost, without what they compute and throw away.

    ``pairs`` takes the shapes of query and of the first optional key, and the geometry, and gives the number of (query,
    key) pairs of all images and heads. Forward has two products over them; backward five: logits again, and the
    gradients of probabilities, query, key and value.
    """

    @register_flop_formula(forward)
    def flops(
        query: Shape, _key: Shape, value: Shape, _bias: Shape, extra_key: Shape, _extra: Shape, *geometry: Any, **_: Any
    ) -> int:
        return 2 * pairs(query, extra_key, *geometry) * (query[-1] + value[-1])

    @register_flop_formula(backward)
    def backward_flops(_grad_output: Shape, _grad_lse: Shape, *saved: Any, **_: Any) -> int:
        query, _key, value, _bias, extra_key = saved[: OPERANDS - 1]
        return 2 * pairs(query, extra_key, *saved[OPERANDS + 2 :]) * (3 * query[-1] + 2 * value[-1])


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    return output, query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))


def _fake_backward(grad_output: Tensor, grad_lse: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    absent = grad_output.new_empty(0)
    return tuple(
        torch.empty_like(absent) if operand is None else operand.new_empty(operand.shape)
        for operand in saved[:OPERANDS]
    )


def _save_operands(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:OPERANDS], *output)
    ctx.geometry = inputs[OPERANDS:]
