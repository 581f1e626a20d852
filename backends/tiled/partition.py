"""The blocks of grouped attention: windows that are cut alike are the tiles of one block.

Truncated windows at the borders are blocks of their own, of just their size, so nothing is rolled and nothing masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from math import prod

import torch
from torch import Tensor

from ...operators.partition_rule import AxisBlock, AxisPartition, axis_blocks
from .blocks import Block
from .logit_terms import FIRST_BIAS, FREE, over_axes, row_major
from .tiles import AxisTiles


@dataclass(frozen=True)
class AxisSpan:
    """Alike windows along one axis: ``slots`` (tokens, then padding) from window position ``first_slot`` on."""

    tiles: AxisTiles
    first_slot: int
    slots: int


@lru_cache(maxsize=128)
def partition_blocks(
    partitions: tuple[AxisPartition, ...], has_bias: bool, additional: int, device: torch.device
) -> tuple[Block, ...]:
    """The blocks of a partitioned map; extra keys of a group are the ``additional`` ones, then its padding."""
    spans = map(_axis_spans, partitions)
    sizes = tuple(partition.window for partition in partitions)
    return tuple(_block(axes, sizes, has_bias, additional, device) for axes in product(*spans))


def _axis_spans(partition: AxisPartition) -> list[AxisSpan]:
    """Groups that are cut alike and follow each other, and the same of neighboring residues, are one span."""
    spans = []
    residues = {
        residue: tuple(_runs(partition, residue)) for residue in range(min(partition.interval, partition.length))
    }
    for runs, alike in groupby(residues, key=lambda residue: residues[residue]):
        first, *others = alike
        for start, count, tokens, first_slot, slots in runs:
            common = (partition.window, count, first, 1 + len(others), partition.interval)
            spans.append(AxisSpan(AxisTiles(start, tokens, *common), first_slot, slots))
    return spans


def _runs(partition: AxisPartition, residue: int) -> Iterator[tuple[int, int, int, int, int]]:
    """First token (counted inside the residue), number, tokens, first slot and slots of groups that are cut alike."""

    def layout(block: AxisBlock) -> tuple[int, int, int]:
        return block.tokens, block.first_slot, block.slots

    own = (block for block in axis_blocks(partition) if block.start % partition.interval == residue)
    for (tokens, first_slot, slots), alike in groupby(own, key=layout):
        starts = [block.start // partition.interval for block in alike]
        yield starts[0], len(starts), tokens, first_slot, slots


def _block(
    axes: tuple[AxisSpan, ...], window_size: tuple[int, ...], has_bias: bool, additional: int, device: torch.device
) -> Block:
    tiles = tuple(span.tiles for span in axes)
    padding = prod(span.slots for span in axes) - prod(axis.size for axis in tiles)
    if not has_bias:
        return Block(tiles, tiles, None, additional + padding)
    positions = row_major([torch.arange(s.first_slot, s.first_slot + s.slots)[None] for s in axes], window_size)[0]
    is_token = over_axes([(torch.arange(s.slots) < s.tiles.size)[None] for s in axes], torch.logical_and)[0]
    terms = FIRST_BIAS + _entries(positions[is_token], positions, is_token, prod(window_size))
    tokens, others = terms.tensor_split([int(is_token.sum())], dim=1)
    terms = torch.cat([tokens, tokens.new_full((len(tokens), additional), FREE), others], dim=1)
    return Block(tiles, tiles, terms.to(device), additional + padding)


def _entries(queries: Tensor, slots: Tensor, is_token: Tensor, size: int) -> Tensor:
    """Bias entries of query positions by slot positions, tokens before padding."""
    return queries[:, None] * size + torch.cat([slots[is_token], slots[~is_token]])
