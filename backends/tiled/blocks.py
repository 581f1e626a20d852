"""Attention over blocks: equally shaped query tiles, each with its key tile and the same logit terms.

Work goes in runs of tiles small enough to stay in cache, which is worth a factor of two on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...numerics.precision import accumulation_dtype
from ...operators.attention_problem import AttentionProblem
from .logit_terms import FIRST_BIAS, bias_gradient, logit_table
from .tile_attention import (
    Attention,
    Derivative,
    Outcome,
    Tile,
    attention_by,
    derivative_by,
    fits_fused_kernel,
    outcome_of,
)
from .tiles import Index, Tiling, accumulate, chunks, lead_shape, read, tile_view, write

# With larger runs the C allocator returns their memory to the system after every use: thousands of page faults.
RUN_BYTES = {"cpu": 6 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Block:
    """Tilings of queries and keys with equal counts; ``terms`` indexes the logit table, ``[points, keys + extras]``.

    No ``terms`` means that nothing is added to any logit. The first ``extras`` of the extra keys follow a tile's keys.
    """

    queries: Tiling
    keys: Tiling
    terms: Tensor | None
    extras: int


class Operands(NamedTuple):
    """Maps ``[B, *grid, heads, channels]``, extra keys and values ``[B, E, heads, channels]`` and the logit table.

    Gradients have the same form.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    extra_key: Tensor
    extra_value: Tensor
    table: Tensor


@dataclass(frozen=True)
class Problem:
    """Attention over blocks that cover every query once."""

    blocks: tuple[Block, ...]
    operands: Operands
    scale: float


def attend(block: Block, problem: Problem, attention: Attention, output: Tensor, lse: Tensor) -> None:
    """Fill the block's part of output ``[B, *grid, heads, d_v]`` and log-sum-exp ``[B, *grid, heads, 1]``."""
    outputs, statistics = tile_view(output, block.queries), tile_view(lse, block.queries)
    for index, tile in _tiles(block, problem, held=1):
        mixed, logarithms = attention(tile)
        write(outputs, index, mixed)
        write(statistics, index, logarithms)


def attend_backward(
    block: Block, problem: Problem, differentiate: Derivative, outcome: Outcome, gradients: Operands
) -> None:
    """Fill the block's part of the query's gradient, and add its part to the other gradients."""
    maps = [tile_view(each, block.queries) for each in outcome]
    grad_query = tile_view(gradients.query, block.queries)
    for index, tile in _tiles(block, problem, held=2):
        of_tile = differentiate(tile, Outcome(*(read(each, index).to(tile.query.dtype) for each in maps)))
        write(grad_query, index, of_tile.query)
        _add_key_gradients(block, index, gradients.key, gradients.extra_key, of_tile.key)
        _add_key_gradients(block, index, gradients.value, gradients.extra_value, of_tile.value)
        if of_tile.logits is not None:
            _add_table_gradient(block, gradients.table, of_tile.logits)


def _tiles(block: Block, problem: Problem, held: int) -> Iterator[tuple[Index, Tile]]:
    """The block's tiles, run by run, in the precision of the softmax; ``held`` is 2 with gradients beside them."""
    operands = problem.operands
    dtype = operands.table.dtype
    lead = lead_shape(operands.query.shape[0], block.queries)
    queries = tile_view(operands.query, block.queries)
    keys, values = (tile_view(each, block.keys) for each in (operands.key, operands.value))
    terms = None if block.terms is None else operands.table[:, block.terms]
    for index in chunks(lead, _run_length(block, operands, held)):
        query = read(queries, index).to(dtype)
        key = _with_extras(read(keys, index).to(dtype), operands.extra_key, block, lead, index)
        value = _with_extras(read(values, index).to(dtype), operands.extra_value, block, lead, index)
        yield index, Tile(query, key, value, terms, problem.scale)


def _run_length(block: Block, operands: Operands, held: int) -> int:
    """How many tiles stay in cache together."""
    heads, head_dim, value_dim = *operands.query.shape[-2:], operands.value.shape[-1]
    points = prod(axis.size for axis in block.queries)
    keys = prod(axis.size for axis in block.keys) + block.extras
    numbers = heads * (points * keys + (points + keys) * (head_dim + value_dim))
    bytes_per_run = RUN_BYTES.get(operands.query.device.type, RUN_BYTES["cuda"])
    return max(1, bytes_per_run // max(1, held * numbers * operands.table.element_size()))


def _with_extras(tiles: Tensor, extra: Tensor, block: Block, lead: tuple[int, ...], index: Index) -> Tensor:
    """Append the extra keys (or values) of a tile's image to its own."""
    if not block.extras:
        return tiles
    rows = extra[:, : block.extras].transpose(1, 2)
    spread = rows.view(len(rows), *(1,) * (len(lead) - 1), *rows.shape[1:]).expand(*lead, *rows.shape[1:])
    return torch.cat([tiles, spread[index].flatten(0, -4).to(tiles.dtype)], dim=2)


def _add_key_gradients(block: Block, index: Index, own: Tensor, extra: Tensor, gradient: Tensor) -> None:
    """Add gradients ``[tiles, heads, keys + extras, channels]`` to those of the map and of the extra keys."""
    keys = gradient.shape[2] - block.extras
    accumulate(own, block.keys, index, gradient[:, :, :keys])
    if block.extras:
        images = extra[index[:1]] if index else extra
        runs = (len(images), len(gradient) // max(1, len(images)))
        per_image = gradient[:, :, keys:].unflatten(0, runs).sum(1)
        images[:, : block.extras].add_(per_image.transpose(1, 2))


def _add_table_gradient(block: Block, table: Tensor, grad_logits: Tensor) -> None:
    if _has_bias(table) and block.terms is not None:
        table.index_add_(1, block.terms.flatten(), grad_logits.sum(0).flatten(1))


def block_operands(problem: AttentionProblem, extra_key: Tensor | None, extra_value: Tensor | None) -> Operands:
    """The operands of a problem with its keys beside those of the map."""
    query, key, value = problem.query, problem.key, problem.value
    table = logit_table(getattr(problem, "bias", None), query.new_empty(0, dtype=accumulation_dtype(query.dtype)))
    return Operands(query, key, value, _or_no_rows(extra_key, key), _or_no_rows(extra_value, value), table)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    operands = problem.operands
    output = operands.query.new_empty(*operands.query.shape[:-1], operands.value.shape[-1])
    lse = operands.table.new_empty(*operands.query.shape[:-1], 1)
    attention = attention_by(fused=_fits_fused_kernel(operands))
    for block in problem.blocks:
        attend(block, problem, attention, output, lse)
    return output, lse[..., 0]


def backward(
    problem: Problem, bias: Tensor | None, results: tuple[Tensor, ...], arrived: tuple[Tensor | None, ...]
) -> Operands:
    """Gradients of the operands, in the precision of the softmax; that of the ``bias`` in the place of the table's."""
    query, *others = problem.operands
    like = problem.operands.table
    gradients = Operands(like.new_empty(query.shape), *(like.new_zeros(each.shape) for each in others))
    outcome = outcome_of(results, arrived)
    is_fused = not _has_bias(like) and _fits_fused_kernel(problem.operands) and arrived[1] is None
    differentiate = derivative_by(is_fused)
    for block in problem.blocks:
        attend_backward(block, problem, differentiate, outcome, gradients)
    return gradients._replace(table=bias_gradient(gradients.table, bias))


def _or_no_rows(extra: Tensor | None, own: Tensor) -> Tensor:
    return own.new_empty(len(own), 0, *own.shape[-2:]) if extra is None else extra


def _fits_fused_kernel(operands: Operands) -> bool:
    """On a CPU, values as wide as queries, no empty axis, and no bias of -inf, with which a query might see nothing."""
    table = operands.table
    return fits_fused_kernel(operands.query, operands.value) and not table[:, FIRST_BIAS:].isneginf().any()


def _has_bias(table: Tensor) -> bool:
    return table.shape[1] > FIRST_BIAS
