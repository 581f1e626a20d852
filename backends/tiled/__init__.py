"""Attention by tiles: explicit matrix products and softmax over boxes of the map, on any device torch runs on.

Half precision is computed in float32, tile by tile.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from ...numerics.precision import accumulation_dtype
from ...operators.attention_op import OPERANDS
from ...operators.dispatch import Backend, Request
from ...operators.index_rule import axis_rules
from ...operators.partition_rule import attended_slots, axis_partitions
from ..logit_terms import bias_gradient, logit_table
from .blocks import Operands, Problem, backward, forward
from .cost import Work, seconds
from .neighborhood import cheapest_tile, neighborhood_blocks
from .partition import partition_blocks


def local_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
) -> Problem:
    """Neighborhood attention as blocks."""
    rules = axis_rules(tuple(query.shape[1:-2]), kernel_size, stride, dilation, is_causal)
    extras = 0 if additional_keys is None else additional_keys.shape[1]
    work = Work(query.device.type, query.shape[0] * query.shape[-2], query.shape[-1] + value.shape[-1])
    tile, _ = cheapest_tile(rules, work)
    blocks = neighborhood_blocks(rules, tile, bias is not None, extras, query.device)
    operands = _operands(query, key, value, bias, additional_keys, additional_values)
    return Problem(blocks, operands, scale)


def grouped_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    pad_key: Tensor | None,
    pad_value: Tensor | None,
    window_size: tuple[int, ...],
    shift: tuple[int, ...],
    scale: float,
) -> Problem:
    """Attention inside windows as blocks; every padded slot is an extra key."""
    geometry = (tuple(query.shape[1:-2]), window_size, shift, pad_key is not None)
    blocks = partition_blocks(*geometry, bias is not None, query.device)
    extras = max((block.extras for block in blocks), default=0)  # a map without tokens has no blocks
    pads = (None if pad is None else pad.expand(len(query), extras, -1, -1) for pad in (pad_key, pad_value))
    return Problem(blocks, _operands(query, key, value, bias, *pads), scale)


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
) -> Operands:
    table = logit_table(bias, query.new_empty(0, dtype=accumulation_dtype(query.dtype)))
    return Operands(query, key, value, _no_rows(key, extra_key), _no_rows(value, extra_value), table)


def _no_rows(own: Tensor, extra: Tensor | None) -> Tensor:
    return own.new_empty(len(own), 0, *own.shape[-2:]) if extra is None else extra


def local_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Neighborhood attention; see ``attnrewrite.operators.local_attention``."""
    return forward(local_problem(*arguments))


def local_attention_backward(grad_output: Tensor, grad_lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of the tensor operands of ``local_attention``."""
    operands, results, geometry = rest[:OPERANDS], rest[OPERANDS : OPERANDS + 2], rest[OPERANDS + 2 :]
    gradients = backward(local_problem(*operands, *geometry), grad_output, grad_lse, *results)
    return _in_order(gradients, operands)


def grouped_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Attention inside blocks; see ``attnrewrite.operators.grouped_attention``."""
    return forward(grouped_problem(*arguments))


def grouped_attention_backward(grad_output: Tensor, grad_lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of the tensor operands of ``grouped_attention``."""
    operands, results, geometry = rest[:OPERANDS], rest[OPERANDS : OPERANDS + 2], rest[OPERANDS + 2 :]
    gradients = backward(grouped_problem(*operands, *geometry), grad_output, grad_lse, *results)
    *others, pad_keys, pad_values = _in_order(gradients, operands)
    return (*others, pad_keys.sum((0, 1)), pad_values.sum((0, 1)))


def _in_order(gradients: Operands, operands: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """In the order of the operator's operands."""
    query, key, value, extra_key, extra_value, table = gradients
    return query, key, value, bias_gradient(table, operands[3]), extra_key, extra_value


def cost(request: Request) -> float:
    """Modelled seconds."""
    work = Work(request.device, request.batch * request.heads, request.head_dim + request.value_dim)
    if request.operator.startswith("local_attention"):
        rules = axis_rules(request.grid, request.window, request.stride, request.dilation, request.is_causal)
        return cheapest_tile(rules, work)[1]
    partitions = axis_partitions(request.grid, request.window, request.shift, request.extra_keys > 0)
    tokens = prod(request.grid)
    return seconds(work, prod(map(attended_slots, partitions)), tokens, tokens // prod(request.window), 1)


TILED = Backend(
    name="tiled",
    implementations={
        "local_attention": local_attention,
        "local_attention_backward": local_attention_backward,
        "grouped_attention": grouped_attention,
        "grouped_attention_backward": grouped_attention_backward,
    },
    cost=cost,
)
