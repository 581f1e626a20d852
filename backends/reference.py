"""The reference: gather every query's keys by the index rules, then attend by the textbook formulas.

It is the meaning of the operators, for any dtype and device. It copies each key as often as it is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..numerics.precision import accumulation_dtype
from ..operators.attention_op import OPERANDS
from ..operators.dispatch import Backend, Request
from ..operators.index_rule import axis_rules, axis_table
from ..operators.partition_rule import AxisPartition, axis_blocks, axis_partitions
from .logit_terms import ABSENT, FIRST_BIAS, FREE, bias_gradient, logit_table, over_axes, row_major

SECONDS_PER_GATHERED_NUMBER = 1e-9


@dataclass(frozen=True)
class Problem:
    """Query n of ``[B, *grid, heads, d]`` sees the keys ``rows[n]`` with the logit terms ``terms[n]``, both int64.

    Rows count through the map's keys and then through the extra keys, ``[B, E, heads, d]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    extra_key: Tensor | None
    extra_value: Tensor | None
    rows: Tensor
    terms: Tensor
    scale: float


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
    """What each query of ``local_attention`` sees."""
    grid = tuple(query.shape[1:-2])
    rules = axis_rules(grid, kernel_size, stride, dilation, is_causal)
    tables = [axis_table(rule, query.device) for rule in rules]
    rows = row_major([table.keys for table in tables], grid)
    entries = row_major([table.bias_index for table in tables], [2 * size - 1 for size in kernel_size])
    valid = over_axes([table.valid for table in tables], torch.logical_and)
    terms = torch.where(valid, FREE if bias is None else FIRST_BIAS + entries, ABSENT)
    if additional_keys is not None:
        additional = prod(grid) + torch.arange(additional_keys.shape[1], device=query.device)
        rows = torch.cat([rows, additional.expand(len(rows), -1)], dim=1)
        terms = torch.cat([terms, torch.full_like(additional, FREE).expand(len(rows), -1)], dim=1)
    return Problem(query, key, value, bias, additional_keys, additional_values, rows, terms, scale)


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
    """What each query of ``grouped_attention`` sees; all padding is one extra row."""
    grid = tuple(query.shape[1:-2])
    partitions = axis_partitions(grid, window_size, shift, pad_key is not None)
    tables = [_slots(partition) for partition in partitions]
    keys, is_token, is_present, positions = (list(column) for column in zip(*tables, strict=True))
    slots = prod(window_size)
    entries = row_major(positions, window_size) * slots + torch.arange(slots)
    rows = torch.where(over_axes(is_token, torch.logical_and), row_major(keys, grid), prod(grid))
    present = over_axes(is_present, torch.logical_and)
    terms = torch.where(present, FREE if bias is None else FIRST_BIAS + entries, ABSENT)
    rows = torch.where(present, rows, 0)  # an absent slot points anywhere
    pads = _pad_row(pad_key, query), _pad_row(pad_value, query)
    return Problem(query, key, value, bias, *pads, rows.to(query.device), terms.to(query.device), scale)


def _pad_row(pad: Tensor | None, query: Tensor) -> Tensor | None:
    return None if pad is None else pad.expand(len(query), 1, -1, -1)


def _slots(partition: AxisPartition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token and slot of its window: key, is it a token, is it present; and the token's own position."""
    tokens = [(block, token) for block in axis_blocks(partition) for token in range(block.tokens)]
    found = [(block.start - block.first_slot, block.start + block.slots, block.first_slot + at) for block, at in tokens]
    origin, end, position = torch.tensor(found, dtype=torch.long).view(-1, 3, 1).unbind(1)  # a row for each token
    keys = origin + torch.arange(partition.window)
    is_present = (keys >= 0) & (keys < end)
    return keys, is_present & (keys < partition.length), is_present, position


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    query, keys, values = _gathered(problem)
    probabilities, lse = _softmax(problem, query, keys)
    output = torch.einsum("bnhk,bnkhd->bnhd", probabilities, values)
    map_shape = problem.query.shape[:-1]
    return output.reshape(*map_shape, problem.value.shape[-1]).to(problem.query.dtype), lse.reshape(map_shape)


def backward(problem: Problem, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias, extra key and extra value."""
    query, keys, values = _gathered(problem)
    probabilities, _ = _softmax(problem, query, keys)
    grad_output = grad_output.flatten(1, -3).to(query.dtype)
    grad_probabilities = torch.einsum("bnhd,bnkhd->bnhk", grad_output, values)
    grad_mean = (probabilities * grad_probabilities).sum(-1) - grad_lse.flatten(1, -2)
    grad_logits = probabilities * (grad_probabilities - grad_mean[..., None])
    grad_query = torch.einsum("bnhk,bnkhd->bnhd", grad_logits, keys) * problem.scale
    grad_keys = torch.einsum("bnhk,bnhd->bnkhd", grad_logits, query) * problem.scale
    grad_values = torch.einsum("bnhk,bnhd->bnkhd", probabilities, grad_output)
    grad_key, grad_extra_key = _scatter(problem.rows, grad_keys, problem.key, problem.extra_key)
    grad_value, grad_extra_value = _scatter(problem.rows, grad_values, problem.value, problem.extra_value)
    grad_bias = _bias_gradient(problem, grad_logits)
    return (
        grad_query.reshape(problem.query.shape),
        grad_key,
        grad_value,
        grad_bias,
        grad_extra_key,
        grad_extra_value,
    )


def _gathered(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[B, N, heads, d]``; the keys and values it sees ``[B, N, K, heads, d]``."""
    dtype = accumulation_dtype(problem.query.dtype)
    pairs = ((problem.key, problem.extra_key), (problem.value, problem.extra_value))
    keys, values = (
        torch.cat([own.flatten(1, -3), *([] if extra is None else [extra])], dim=1)[:, problem.rows].to(dtype)
        for own, extra in pairs
    )
    return problem.query.flatten(1, -3).to(dtype), keys, values


def _softmax(problem: Problem, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[B, N, heads, K]`` and log-sum-exp ``[B, N, heads]``."""
    table = logit_table(problem.bias, query)
    logits = torch.einsum("bnhd,bnkhd->bnhk", query, keys) * problem.scale
    logits = logits + table[:, problem.terms].transpose(0, 1)
    lse = logits.logsumexp(dim=-1)
    return (logits - lse[..., None]).exp(), lse


def _scatter(rows: Tensor, gradients: Tensor, own: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum gradients ``[B, N, K, heads, d]`` into the rows they belong to: the map's, and the extra ones."""
    batch, tokens = len(own), prod(own.shape[1:-2])
    total = tokens + (0 if extra is None else extra.shape[1])
    summed = gradients.new_zeros(batch, total, *own.shape[-2:])
    summed.index_add_(1, rows.flatten(), gradients.flatten(1, 2))
    in_map, in_extra = summed.tensor_split([tokens], dim=1)
    return in_map.reshape(own.shape), in_extra.clone()  # operators must not return aliases


def _bias_gradient(problem: Problem, grad_logits: Tensor) -> Tensor:
    """Gradient of the bias from that of the logits, ``[B, N, heads, K]``."""
    if problem.bias is None:
        return grad_logits.new_empty(0)
    table = torch.zeros_like(logit_table(problem.bias, grad_logits))
    table.index_add_(1, problem.terms.flatten(), grad_logits.sum(0).transpose(0, 1).flatten(1))
    return bias_gradient(table, problem.bias)


def local_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Neighborhood attention; see ``attnrewrite.operators.local_attention``."""
    return forward(local_problem(*arguments))


def local_attention_backward(grad_output: Tensor, grad_lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of the tensor operands of ``local_attention``; output and log-sum-exp are computed afresh."""
    return backward(local_problem(*rest[:OPERANDS], *rest[OPERANDS + 2 :]), grad_output, grad_lse)


def grouped_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Attention inside blocks; see ``attnrewrite.operators.grouped_attention``."""
    return forward(grouped_problem(*arguments))


def grouped_attention_backward(grad_output: Tensor, grad_lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of the tensor operands of ``grouped_attention``; output and log-sum-exp are computed afresh."""
    problem = grouped_problem(*rest[:OPERANDS], *rest[OPERANDS + 2 :])
    *gradients, grad_pad_key, grad_pad_value = backward(problem, grad_output, grad_lse)
    return (*gradients, grad_pad_key.sum((0, 1)), grad_pad_value.sum((0, 1)))


def cost(request: Request) -> float:
    """Modelled seconds: gathering the keys and values dominates."""
    keys_seen = prod(request.window) + request.extra_keys
    pairs = request.batch * request.heads * prod(request.grid) * keys_seen
    return pairs * (request.head_dim + request.value_dim) * SECONDS_PER_GATHERED_NUMBER


REFERENCE = Backend(
    name="reference",
    implementations={
        "local_attention": local_attention,
        "local_attention_backward": local_attention_backward,
        "grouped_attention": grouped_attention,
        "grouped_attention_backward": grouped_attention_backward,
    },
    cost=cost,
)
