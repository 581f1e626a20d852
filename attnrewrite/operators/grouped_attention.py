"""The operator ``attnrewrite::grouped_attention``: attention inside the blocks of a partition of a map.

Shapes, with heads last: query and key ``[B, *grid, heads, d]``, value ``[B, *grid, heads, d_v]``; optional bias
``[heads, n, n]`` over the n slots of a full window (row-major; rows are queries, columns are keys), of which
truncated blocks use their part. With ``pad_key [heads, d]`` and ``pad_value [heads, d_v]`` the map counts as
padded at the end of each axis to a multiple of the window, and every padded slot is that key and value (Swin
does not mask its padding); without them no slot outside the map is attended to. Results: output `[B, *grid,
heads, d_v]`` and the log-sum-exp of all logits ``[B, *grid, heads]` (natural logarithm; float32 for half
precision). Arguments are not checked here: see ``attnrewrite.functional``.

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
from .partition_rule import Windows, attended_slots, axis_partitions

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? pad_key, Tensor? pad_value"
_GEOMETRY = "int[] window_size, int[] shift, float scale, str backend"


@torch.library.custom_op(
    "attnrewrite::grouped_attention",
    mutates_args=(),
    schema=f"({_OPERANDS}, {_GEOMETRY}) -> (Tensor, Tensor)",
)
def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    window_size: Sequence[int],
    shift: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """Attend; an empty ``backend`` means the best one."""
    geometry = Windows(tuple(window_size), tuple(shift))
    request = grouped_request("grouped_attention", query, value, bias, pad_key, geometry)
    return contiguous(*run(request, backend, query, key, value, bias, pad_key, pad_value, *geometry, scale))


@torch.library.custom_op(
    "attnrewrite::grouped_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor grad_lse, {_OPERANDS}, Tensor output, Tensor lse, {_GEOMETRY})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def grouped_attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    output: Tensor,
    lse: Tensor,
    window_size: Sequence[int],
    shift: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of the six tensor operands in order; an absent operand has an empty gradient."""
    geometry = Windows(tuple(window_size), tuple(shift))
    request = grouped_request("grouped_attention_backward", query, value, bias, pad_key, geometry)
    operands = (query, key, value, bias, pad_key, pad_value)
    found = run(request, backend, grad_output, grad_lse, *operands, output, lse, *geometry, scale)
    return gradients_of(operands, found)


make_differentiable(grouped_attention, grouped_attention_backward)


def grouped_request(
    operator: str,
    query: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad_key: Tensor | None,
    geometry: Windows,
    needs_gradient: bool = False,
) -> Request:
    """Describe a call of this operator, or of its backward operator, to the backends."""
    return attention_request(
        operator,
        query,
        value,
        geometry.window_size,
        shift=geometry.shift,
        extra_keys=0 if pad_key is None else 1,
        has_bias=bias is not None,
        needs_gradient=needs_gradient,
    )


def _pairs(
    query: Sequence[int],
    pad_key: Sequence[int] | None,
    window_size: Sequence[int],
    shift: Sequence[int],
    *_: Any,
) -> int:
    """Number of (token, slot) pairs of all images and heads.

    On a map that the window divides, unshifted, these are B heads N n pairs. Truncated blocks count with
    the slots they have; padding counts as keys, which it is, but not as queries, whose results would be
    thrown away.
    """
    batch, *grid, heads, _dim = query
    partitions = axis_partitions(tuple(grid), tuple(window_size), tuple(shift), pad_key is not None)
    return batch * heads * prod(map(attended_slots, partitions))


register_flops(torch.ops.attnrewrite.grouped_attention, torch.ops.attnrewrite.grouped_attention_backward, _pairs)
