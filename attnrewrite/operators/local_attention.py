"""The operator ``attnrewrite::local_attention``: neighborhood attention on 1-D, 2-D and 3-D maps.

Shapes, with heads last: query and key ``[B, *grid, heads, d]``, value ``[B, *grid, heads, d_v]``; optional bias
``[heads, 2k-1 per axis]``, indexed by key minus query; optional additional keys and values `[B, A, heads, d or
d_v]`` that every query sees. Results: output ``[B, *grid, heads, d_v]`` and the log-sum-exp of all logits ``[B,
*grid, heads]` (natural logarithm; float32 for half precision). Arguments are not checked here: see
``attnrewrite.functional``.

Gradients flow through both results. There is no gradient of the gradient, no forward-mode derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .attention_op import attention_request, contiguous, gradients_of, make_differentiable, register_flops
from .dispatch import Request, run
from .index_rule import Neighborhood, attended_pairs, axis_rules

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? additional_keys, Tensor? additional_values"
_GEOMETRY = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale, str backend"


@torch.library.custom_op(
    "attnrewrite::local_attention", mutates_args=(), schema=f"({_OPERANDS}, {_GEOMETRY}) -> (Tensor, Tensor)"
)
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """Attend; an empty ``backend`` means the best one."""
    geometry = Neighborhood(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))
    request = local_request("local_attention", query, value, bias, additional_keys, geometry)
    operands = (query, key, value, bias, additional_keys, additional_values)
    return contiguous(*run(request, backend, *operands, *geometry, scale))


@torch.library.custom_op(
    "attnrewrite::local_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor grad_lse, {_OPERANDS}, Tensor output, Tensor lse, {_GEOMETRY})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def local_attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of the six tensor operands in order; an absent operand has an empty gradient."""
    geometry = Neighborhood(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))
    request = local_request("local_attention_backward", query, value, bias, additional_keys, geometry)
    operands = (query, key, value, bias, additional_keys, additional_values)
    found = run(request, backend, grad_output, grad_lse, *operands, output, lse, *geometry, scale)
    return gradients_of(operands, found)


make_differentiable(local_attention, local_attention_backward)


def local_request(
    operator: str,
    query: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    geometry: Neighborhood,
    needs_gradient: bool = False,
) -> Request:
    """Describe a call of this operator, or of its backward operator, to the backends."""
    return attention_request(
        operator,
        query,
        value,
        geometry.kernel_size,
        stride=geometry.stride,
        dilation=geometry.dilation,
        is_causal=geometry.is_causal,
        extra_keys=0 if additional_keys is None else additional_keys.shape[1],
        has_bias=bias is not None,
        needs_gradient=needs_gradient,
    )


def _pairs(
    query: Sequence[int],
    additional_keys: Sequence[int] | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    *_: Any,
) -> int:
    """Number of (query, key) pairs of all images and heads.

    Exactly the keys that each query sees, not those that a kernel touches besides.
    """
    batch, *grid, heads, _dim = query
    rules = axis_rules(tuple(grid), tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))
    additional = 0 if additional_keys is None else prod(grid) * additional_keys[1]
    return batch * heads * (prod(map(attended_pairs, rules)) + additional)


register_flops(torch.ops.attnrewrite.local_attention, torch.ops.attnrewrite.local_attention_backward, _pairs)
