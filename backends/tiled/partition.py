"""The blocks of grouped attention: windows that are cut alike are the tiles of one block.

Truncated windows at the borders are blocks of their own, of just their size, so nothing is rolled and nothing masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from math import prod

import torch
from torch import Tensor

from ...operators.partition_rule import AxisBlock, AxisPartition, axis_blocks, axis_partitions
from ..logit_terms import FIRST_BIAS, over_axes, row_major
from .blocks import Block
from .tiles import AxisTiles


@dataclass(frozen=True)
class AxisSpan:
    """Alike windows along one axis: ``slots`` (tokens, then padding) from window position ``first_slot`` on."""

    tiles: AxisTiles
    first_slot: int
    slots: int


@lru_cache(maxsize=128)
def partition_blocks(
    grid: tuple[int, ...],
    window_size: tuple[int, ...],
    shift: tuple[int, ...],
    padded: bool,
    has_bias: bool,
    device: torch.device,
) -> tuple[Block, ...]:
    """The blocks of a partitioned map; the padding of a window are its extra keys."""
    spans = map(_axis_spans, axis_partitions(grid, window_size, shift, padded))
    return tuple(_block(axes, window_size, has_bias, device) for axes in product(*spans))


def _axis_spans(partition: AxisPartition) -> list[AxisSpan]:
    def layout(block: AxisBlock) -> tuple[int, int, int]:
        return block.tokens, block.first_slot, block.slots

    spans = []
    for (tokens, first_slot, slots), alike in groupby(axis_blocks(partition), key=layout):
        starts = [block.start for block in alike]
        spans.append(AxisSpan(AxisTiles(starts[0], tokens, partition.window, len(starts)), first_slot, slots))
    return spans


def _block(
    axes: tuple[AxisSpan, ...], window_size: tuple[int, ...], has_bias: bool, device: torch.device
) -> Block:
    tiles = tuple(span.tiles for span in axes)
    extras = prod(span.slots for span in axes) - prod(axis.size for axis in tiles)
    if not has_bias:
        return Block(tiles, tiles, None, extras)
    positions = row_major(
        [torch.arange(s.first_slot, s.first_slot + s.slots)[None] for s in axes], window_size
    )[0]
    is_token = over_axes([(torch.arange(s.slots) < s.tiles.size)[None] for s in axes], torch.logical_and)[0]
    terms = FIRST_BIAS + _entries(positions[is_token], positions, is_token, prod(window_size))
    return Block(tiles, tiles, terms.to(device), extras)


def _entries(queries: Tensor, slots: Tensor, is_token: Tensor, size: int) -> Tensor:
    """Bias entries of query positions by slot positions, tokens before padding."""
    return queries[:, None] * size + torch.cat([slots[is_token], slots[~is_token]])
