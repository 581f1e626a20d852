"""Attention over one block: equally shaped query tiles, each with its key tile and the same logit terms.

Work goes in runs of tiles small enough to stay in cache, which is worth a factor of two on a CPU. Logits are
taken to base 2, because the vectorised `exp` of a CPU leaves its fast path at -inf (masked keys) and `exp2`
does not: a factor of eight for that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..logit_terms import FIRST_BIAS
from .tiles import Index, Tiling, accumulate, chunks, lead_shape, read, tile_view, write

RUN_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Block:
    """Tilings of queries and keys with equal counts; `terms` indexes the logit table, `[points, keys +
    extras]`.

    No `terms` means that nothing is added to any logit. The first `extras` of the extra keys follow a tile's
    keys.
    """

    queries: Tiling
    keys: Tiling
    terms: Tensor | None
    extras: int


class Operands(NamedTuple):
    """Maps `[B, *grid, heads, channels]`, extra keys and values `[B, E, heads, channels]` and the logit
    table.

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


@dataclass(frozen=True)
class Tile:
    """A run of tiles `[tiles, heads, points, channels]`; query and terms are scaled for logits to base 2."""

    query: Tensor
    key: Tensor
    value: Tensor
    terms: Tensor | None

    @property
    def can_be_fused(self) -> bool:
        """torch's own kernel for a CPU, a sixth to a third faster than ours, wants values as wide as queries."""
        return self.query.device.type == "cpu" and self.query.shape[-1] == self.value.shape[-1]

    def fused(self) -> tuple[Tensor, Tensor]:
        """Mixed values, and the log-sum-exp `[tiles, heads, points, 1]`."""
        terms = None if self.terms is None else (self.terms * log(2))[None]
        mixed, logarithms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            self.query, self.key, self.value, 0.0, False, attn_mask=terms, scale=log(2)
        )
        return mixed, logarithms[..., None]

    def attended(self) -> tuple[Tensor, Tensor]:
        """The same from explicit products."""
        logits = self.logits()
        peak = logits.amax(-1, keepdim=True)
        weights = logits.sub_(peak).exp2_()
        total = weights.sum(-1, keepdim=True)
        return (weights @ self.value).div_(total), total.log2_().add_(peak).mul_(log(2))

    def logits(self) -> Tensor:
        logits = self.query @ self.key.transpose(-1, -2)
        return logits if self.terms is None else logits.add_(self.terms)


def attend(block: Block, operands: Operands, scale: float, output: Tensor, lse: Tensor) -> None:
    """Fill the block's part of output `[B, *grid, heads, d_v]` and log-sum-exp `[B, *grid, heads]`."""
    outputs, statistics = tile_view(output, block.queries), tile_view(lse[..., None], block.queries)
    for index, tile in _tiles(block, operands, scale):
        mixed, logarithms = tile.fused() if tile.can_be_fused else tile.attended()
        write(outputs, index, mixed)
        write(statistics, index, logarithms)


def attend_backward(
    block: Block,
    operands: Operands,
    scale: float,
    grad_output: Tensor,
    grad_mean: Tensor,
    lse: Tensor,
    gradients: Operands,
) -> None:
    """Add the block's part to the gradients.

    `grad_mean` `[B, *grid, heads]` is sum(grad_output * output) - grad_lse: what the softmax subtracts from
    the gradients of its probabilities.
    """
    outputs = tile_view(grad_output, block.queries)
    means, statistics = (tile_view(each[..., None], block.queries) for each in (grad_mean, lse))
    for index, tile in _tiles(block, operands, scale):
        probabilities = tile.logits().sub_(read(statistics, index) / log(2)).exp2_()
        grad_tile = read(outputs, index).to(tile.query.dtype)
        grad_logits = (grad_tile @ tile.value.transpose(-1, -2)).sub_(read(means, index)).mul_(probabilities)
        _add_key_gradients(block, index, gradients.value, gradients.extra_value, probabilities.mT @ grad_tile)
        grad_key = (grad_logits.mT @ tile.query).mul_(log(2))
        _add_key_gradients(block, index, gradients.key, gradients.extra_key, grad_key)
        write(tile_view(gradients.query, block.queries), index, (grad_logits @ tile.key).mul_(scale))
        _add_table_gradient(block, gradients.table, grad_logits)


def _tiles(block: Block, operands: Operands, scale: float) -> Iterator[tuple[Index, Tile]]:
    """The block's tiles, run by run, in the precision of the softmax."""
    dtype = operands.table.dtype
    lead = lead_shape(operands.query.shape[0], block.queries)
    queries = tile_view(operands.query, block.queries)
    keys, values = (tile_view(each, block.keys) for each in (operands.key, operands.value))
    terms = None if block.terms is None else operands.table[:, block.terms] / log(2)
    for index in chunks(lead, _run_length(block, operands)):
        query = read(queries, index).to(dtype) * (scale / log(2))
        key = _with_extras(read(keys, index).to(dtype), operands.extra_key, block, lead, index)
        value = _with_extras(read(values, index).to(dtype), operands.extra_value, block, lead, index)
        yield index, Tile(query, key, value, terms)


def _run_length(block: Block, operands: Operands) -> int:
    """How many tiles stay in cache together."""
    heads, head_dim, value_dim = *operands.query.shape[-2:], operands.value.shape[-1]
    points = prod(axis.size for axis in block.queries)
    keys = prod(axis.size for axis in block.keys) + block.extras
    numbers = heads * (points * keys + (points + keys) * (head_dim + value_dim))
    bytes_per_run = RUN_BYTES.get(operands.query.device.type, RUN_BYTES["cuda"])
    return max(1, bytes_per_run // (numbers * operands.table.element_size()))


def _with_extras(tiles: Tensor, extra: Tensor, block: Block, lead: tuple[int, ...], index: Index) -> Tensor:
    """Append the extra keys (or values) of a tile's image to its own."""
    if not block.extras:
        return tiles
    rows = extra[:, : block.extras].transpose(1, 2)
    spread = rows.view(len(rows), *(1,) * (len(lead) - 1), *rows.shape[1:]).expand(*lead, *rows.shape[1:])
    return torch.cat([tiles, spread[index].flatten(0, -4).to(tiles.dtype)], dim=2)


def _add_key_gradients(block: Block, index: Index, own: Tensor, extra: Tensor, gradient: Tensor) -> None:
    """Add gradients `[tiles, heads, keys + extras, channels]` to those of the map and of the extra keys."""
    keys = gradient.shape[2] - block.extras
    accumulate(own, block.keys, index, gradient[:, :, :keys])
    if block.extras:
        images = extra[index[:1]] if index else extra
        runs = (len(images), len(gradient) // max(1, len(images)))
        per_image = gradient[:, :, keys:].unflatten(0, runs).sum(1)
        images[:, : block.extras].add_(per_image.transpose(1, 2))


def _add_table_gradient(block: Block, table: Tensor, grad_logits: Tensor) -> None:
    has_bias = table.shape[1] > FIRST_BIAS
    if has_bias and block.terms is not None:
        table.index_add_(1, block.terms.flatten(), grad_logits.sum(0).flatten(1))


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    operands = problem.operands
    map_shape = operands.query.shape[:-1]
    output = operands.query.new_empty(*map_shape, operands.value.shape[-1])
    lse = operands.table.new_empty(map_shape)
    for block in problem.blocks:
        attend(block, operands, problem.scale, output, lse)
    return output, lse


def backward(
    problem: Problem, grad_output: Tensor, grad_lse: Tensor, output: Tensor, lse: Tensor
) -> Operands:
    """Gradients of the operands, in the precision of the softmax."""
    operands = problem.operands
    gradients = Operands(*(operands.table.new_zeros(each.shape) for each in operands))
    grad_mean = (grad_output.to(lse.dtype) * output).sum(-1) - grad_lse
    for block in problem.blocks:
        attend_backward(block, operands, problem.scale, grad_output, grad_mean, lse, gradients)
    return gradients
