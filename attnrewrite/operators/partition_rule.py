"""Which group of a partition a token of grouped attention belongs to, axis by axis.

An axis is cut into regions of window * interval tokens, and token c of a region belongs to its group c % interval. An
interval of 1 gives windows. Longer ones give groups whose tokens lie an interval apart: long distance attention of
CrossFormer (Wang et al. 2022) and grid attention of MaxViT (Tu et al. 2022).

With a shift the first region holds the ``shift`` tokens before the first full one. For windows this is the shifted
window of Swin (Liu et al. 2021) without its cyclic roll: a rolled window that mixes opposite borders is masked so that
it falls apart into exactly these truncated groups.

The rule is stated twice, for two readers, and the tests hold the two against each other: as a table of tokens
(``axis_slots``) and as numbers for kernels (``axis_blocks``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ArgumentError

ABSENT = -1
"""In a slot that is no key: it lies beyond the map, or a border cuts it off."""
PADDING = -2
"""In a slot that lies beyond the map and counts as a key."""


@dataclass(frozen=True)
class AxisPartition:
    """The partition of one axis into groups of ``window`` tokens.

    Attributes:
        padded: the axis counts as padded at its end to a multiple of the window, and the padding as keys.
        interval: from a token of a group to the next one.
        rolled: the axis is rolled by ``shift`` before it is padded, so that the rolled-over tokens join the last real
            ones. On an axis that the window divides it makes no difference.
    """

    length: int
    window: int
    shift: int = 0
    padded: bool = False
    interval: int = 1
    rolled: bool = False

    @property
    def region(self) -> int:
        """Tokens of a region."""
        return self.window * self.interval

    @property
    def is_wrapped(self) -> bool:
        """Whether rolling makes a difference."""
        return self.rolled and self.shift > 0 and self.length % self.window > 0

    @property
    def extent(self) -> int:
        """Number of slots: tokens, and the padding after them if it counts."""
        return self.full_extent if self.padded else self.length

    @property
    def full_extent(self) -> int:
        """Tokens and padding up to the end of the last region, whether or not the padding counts."""
        return -(-self.length // self.region) * self.region


@dataclass(frozen=True)
class AxisBlock:
    """One group: ``tokens`` tokens from ``start`` on, an interval apart, in its slots ``first_slot ..``, of which
    ``slots`` are present.

    The ``slots - tokens`` present slots after the tokens are padding.
    """

    start: int
    tokens: int
    first_slot: int
    slots: int


@lru_cache(maxsize=256)
def axis_blocks(partition: AxisPartition) -> tuple[AxisBlock, ...]:
    """The groups of an axis that hold tokens, residue by residue, in order; not for rolled ones."""
    regions = range(partition.shift - partition.region, partition.length, partition.region)
    groups = (_block(partition, region + residue) for residue in range(partition.interval) for region in regions)
    return tuple(block for block in groups if block.tokens > 0)


def axis_slots(partition: AxisPartition) -> Tensor:
    """``[groups, window]``, int64: the token in every slot of every group of an axis, or ``ABSENT`` or ``PADDING``."""
    if partition.rolled and partition.shift and partition.length:  # not only where it matters: sizes may be symbolic
        return _rolled_slots(partition)
    start, regions = _regions(partition)
    place = start + torch.arange(regions * partition.region).view(regions, partition.window, partition.interval)
    place, end = place.transpose(1, 2).flatten(0, 1), partition.full_extent
    beyond = torch.where(place < end, PADDING if partition.padded else ABSENT, ABSENT)
    return torch.where(place < partition.length, place.clamp(min=ABSENT), beyond)


def slots_of_tokens(slots: Tensor, length: int) -> Tensor:
    """``[length]``, int64: where each token is in flattened ``axis_slots``."""
    token = slots.flatten()
    place = torch.arange(token.numel(), device=token.device)
    nowhere = place.new_zeros(length + 1)  # the last is for all slots without a token
    return nowhere.scatter(0, torch.where(token < 0, length, token), place)[:length]


def map_slots(rows: AxisPartition, columns: AxisPartition) -> Tensor:
    """``[groups, slots]``, int64: the token, in raster order, in every slot of every group of a map, or ``ABSENT`` or
    ``PADDING``. Groups and their slots are pairs of those of the axes, in row-major order."""
    row, column = axis_slots(rows)[:, None, :, None], axis_slots(columns)[None, :, None, :]
    token = torch.where((row >= 0) & (column >= 0), row * columns.length + column, PADDING)
    token = torch.where((row == ABSENT) | (column == ABSENT), ABSENT, token)
    return token.flatten(2).flatten(0, 1)


def attended_slots(partition: AxisPartition) -> int:
    """Number of (token, slot) pairs along an axis; on a map the counts of its axes multiply."""
    if not partition.is_wrapped:
        return sum(block.tokens * block.slots for block in axis_blocks(partition))
    slots = axis_slots(partition)
    return int(((slots >= 0).sum(1) * (slots != ABSENT).sum(1)).sum())


def check_partitions(partitions: tuple[AxisPartition, ...]) -> None:
    """Raise ``ArgumentError`` for an axis on which the partition has no meaning."""
    for axis, partition in enumerate(partitions):
        if partition.window < 1:
            raise ArgumentError(f"window_size must be at least 1, got {partition.window} for axis {axis}")
        if partition.interval < 1:
            raise ArgumentError(f"interval must be at least 1, got {partition.interval} for axis {axis}")
        if not 0 <= partition.shift < partition.region:
            repeats = "window" if partition.interval == 1 else "region of window_size * interval tokens"
            raise ArgumentError(
                f"shift {partition.shift} lies outside 0 .. {partition.region - 1} on axis {axis}: "
                f"shifts repeat with the {repeats}, use {partition.shift % partition.region}"
            )


def _regions(partition: AxisPartition) -> tuple[int, int]:
    """Where the first region begins, and how many there are; none on an axis without tokens."""
    start = partition.shift - partition.region if partition.shift and partition.length else 0
    return start, -(-(partition.full_extent - start) // partition.region)


def _block(partition: AxisPartition, origin: int) -> AxisBlock:
    """The group whose first slot is the token ``origin``, on the axis or before it."""
    step = partition.interval
    first_slot = -(min(origin, 0) // step)
    end, start = origin + partition.region, origin + first_slot * step
    tokens, slots = (max(-(-(min(end, extent) - start) // step), 0) for extent in (partition.length, partition.extent))
    return AxisBlock(start, tokens, first_slot, slots)


def _rolled_slots(partition: AxisPartition) -> Tensor:
    """The groups of the rolled axis; the last one is two, cut ``shift`` slots before the end of the padded axis."""
    length, shift, end = partition.length, partition.shift, partition.full_extent
    place = torch.arange(end).view(-1, partition.window)
    token = torch.where(place < length, (place + shift) % length, PADDING if partition.padded else ABSENT)
    last = place[-1] < end - shift
    parts = (torch.where(last, token[-1], ABSENT), torch.where(last, ABSENT, token[-1]))
    return torch.cat([token[:-1], torch.stack(parts)])
