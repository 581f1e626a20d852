"""Attention by tiles: matrix products and softmax over boxes of the map, on any device torch runs on.

Half precision is computed in float32, tile by tile. Nothing of queries by keys is ever in memory for a whole map.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ...operators import AxialProblem, BiasedProblem, GroupedProblem, LocalProblem
from ...operators.backend import Backend, Request
from ...operators.partition_rule import attended_slots
from . import rows
from .blocks import Problem, backward, block_operands, forward
from .cost import Work, seconds
from .neighborhood import cheapest_tile, neighborhood_blocks
from .partition import partition_blocks

Gradients = tuple[Tensor | None, ...]


def _local_blocks(problem: LocalProblem) -> Problem:
    tile, _ = cheapest_tile(problem.rules, _work(problem))
    has_bias = problem.bias is not None
    blocks = neighborhood_blocks(problem.rules, tile, has_bias, problem.additional, problem.query.device)
    return Problem(blocks, block_operands(problem, problem.additional_keys, problem.additional_values), problem.scale)


def _grouped_blocks(problem: GroupedProblem) -> Problem:
    """Every padded slot is an additional key, after those that every query sees."""
    device = problem.query.device
    blocks = partition_blocks(problem.partitions, problem.bias is not None, problem.additional, device)
    extras = max((block.extras for block in blocks), default=0)  # a map without tokens has no blocks
    slots = extras - problem.additional
    pairs = ((problem.additional_keys, problem.pad_key), (problem.additional_values, problem.pad_value))
    extra = (_joined(additional, pad, len(problem.query), slots) for additional, pad in pairs)
    return Problem(blocks, block_operands(problem, *extra), problem.scale)


def _joined(additional: Tensor | None, pad: Tensor | None, batch: int, slots: int) -> Tensor | None:
    parts = [] if additional is None else [additional]
    if pad is not None:
        parts.append(pad.expand(batch, max(slots, 0), -1, -1))
    return torch.cat(parts, dim=1) if parts else None


def local_attention(problem: LocalProblem) -> tuple[Tensor, Tensor]:
    """A window for every query; see ``attnrewrite.operators.local_attention``."""
    return forward(_local_blocks(problem))


def local_attention_backward(
    problem: LocalProblem, results: tuple[Tensor, ...], gradients: Gradients, wanted: tuple[bool, ...]
) -> Gradients:
    """Gradients of its operands."""
    query, key, value, extra_key, extra_value, bias = backward(_local_blocks(problem), problem.bias, results, gradients)
    return query, key, value, bias, extra_key, extra_value, None, None, None


def grouped_attention(problem: GroupedProblem) -> tuple[Tensor, Tensor]:
    """Attention inside groups; see ``attnrewrite.operators.grouped_attention``."""
    return forward(_grouped_blocks(problem))


def grouped_attention_backward(
    problem: GroupedProblem, results: tuple[Tensor, ...], gradients: Gradients, wanted: tuple[bool, ...]
) -> Gradients:
    """Gradients of its operands."""
    query, key, value, *extra, bias = backward(_grouped_blocks(problem), problem.bias, results, gradients)
    keys, values = (each.tensor_split([problem.additional], dim=1) for each in extra)
    return query, key, value, bias, keys[1].sum((0, 1)), values[1].sum((0, 1)), keys[0], values[0]


def axial_attention(problem: AxialProblem) -> tuple[Tensor, ...]:
    """Attention along an axis; see ``attnrewrite.operators.axial_attention``."""
    return tuple(map(problem.from_lines, rows.forward(problem.as_lines())))


def axial_attention_backward(
    problem: AxialProblem, results: tuple[Tensor, ...], gradients: Gradients, wanted: tuple[bool, ...]
) -> Gradients:
    """Gradients of its operands."""
    arrived = tuple(None if each is None else problem.lines(each) for each in gradients)
    outcome = tuple(problem.lines(each) for each in results)
    *maps, log_decay, _table = rows.backward(problem.as_lines(), outcome, arrived, (*wanted, False))
    return (*(None if each is None else problem.from_lines(each) for each in maps), log_decay)


def cost(request: Request) -> float:
    """Modelled seconds."""
    problem: Any = request.problem
    work = _work(problem)
    if isinstance(problem, LocalProblem):
        return cheapest_tile(problem.rules, work)[1]
    if isinstance(problem, GroupedProblem):
        tokens = prod(problem.grid)
        pairs = prod(map(attended_slots, problem.partitions))
        return seconds(work, pairs, tokens, tokens // problem.slots, 1)
    pairs = problem.pairs() // max(1, work.images_and_heads)
    return seconds(work, pairs, prod(problem.grid), 1, 1)


def supports(request: Request) -> str | None:
    """None, or what a tile cannot add."""
    problem = request.problem
    if isinstance(problem, LocalProblem) and problem.post is not None:
        return "it adds nothing to weights after the softmax"
    if isinstance(problem, LocalProblem) and (problem.additional_bias, problem.place_bias) != (None, None):
        return "it has no bias but the relative one"
    if isinstance(problem, GroupedProblem) and any(p.is_wrapped for p in problem.partitions):
        return "its windows are cut where they lie, and not rolled"
    return None


def _work(problem: LocalProblem | GroupedProblem | BiasedProblem | AxialProblem) -> Work:
    batch, heads, head_dim, value_dim = problem.sizes
    return Work(problem.query.device.type, batch * heads, head_dim + value_dim)


TILED = Backend(
    name="tiled",
    implementations={
        "local_attention": local_attention,
        "local_attention_backward": local_attention_backward,
        "grouped_attention": grouped_attention,
        "grouped_attention_backward": grouped_attention_backward,
        "biased_attention": rows.forward,
        "biased_attention_backward": rows.backward,
        "axial_attention": axial_attention,
        "axial_attention_backward": axial_attention_backward,
    },
    cost=cost,
    supports=supports,
)
