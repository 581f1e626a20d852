"""Which group of a partition a token of grouped attention belongs to, axis by axis.

Windows: token c belongs to group floor((c - shift) / window). With a shift the first group holds the ``shift`` tokens
before the first full window. This is the shifted window of Swin (Liu et al. 2021) without its cyclic roll: a rolled
window that mixes opposite borders is masked so that it falls apart into exactly these truncated groups.

Interleaved groups, whose tokens lie an interval apart (long distance attention of CrossFormer, Wang et al. 2022; grid
attention of MaxViT, Tu et al. 2022): an axis is cut into regions of window * interval tokens, and token c of a region
belongs to its group c % interval. An interval of 1 gives windows.

The rule is stated three times, for three readers, and the tests hold the three against each other: as a table of tokens
(``axis_slots``), as numbers for kernels (``axis_blocks``), and as views of a map (``into_groups``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError

Pair = tuple[int, int]

ABSENT = -1
"""In a slot that is no key: it lies beyond the map, or a border cuts it off."""
PADDING = -2
"""In a slot that lies beyond the map and counts as a key."""


class Windows(NamedTuple):
    """The partition of a map into windows: every field has one entry an axis, of the meaning it has in
    ``AxisPartition``.

    A tuple, so that it spreads into the flat arguments that operators of ``torch.library`` take.
    """

    window_size: tuple[int, ...]
    shift: tuple[int, ...]


@dataclass(frozen=True)
class AxisPartition:
    """The partition of one axis into groups of ``window`` tokens.

    Attributes:
        padded: the axis counts as padded at its end to a multiple of the window, and the padding as keys.
        interval: from a token of a group to the next one; only unshifted partitions have one above 1.
        cyclic: the axis is rolled by ``shift`` before it is padded, so that the rolled-over tokens join the last real
            ones. On an axis that the window divides it makes no difference.
    """

    length: int
    window: int
    shift: int = 0
    padded: bool = False
    interval: int = 1
    cyclic: bool = False

    @property
    def extent(self) -> int:
        """Number of slots: tokens, and the padding after them if it counts."""
        return self.full_extent if self.padded else self.length

    @property
    def full_extent(self) -> int:
        """Tokens and padding up to the end of the last region, whether or not the padding counts."""
        region = self.window * self.interval
        return -(-self.length // region) * region


@dataclass(frozen=True)
class AxisBlock:
    """One block: tokens ``start .. start + tokens``, at window positions ``first_slot ..``, of ``slots`` present
    ones.

    The ``slots - tokens`` present slots after the tokens are padding.
    """

    start: int
    tokens: int
    first_slot: int
    slots: int


def axis_partitions(
    grid: tuple[int, ...], window_size: tuple[int, ...], shift: tuple[int, ...], padded: bool
) -> tuple[AxisPartition, ...]:
    """One partition an axis; the tuples have one entry an axis, already checked by ``check_partitions``."""
    return tuple(AxisPartition(*axis, padded) for axis in zip(grid, window_size, shift, strict=True))


@lru_cache(maxsize=256)
def axis_blocks(partition: AxisPartition) -> tuple[AxisBlock, ...]:
    """The blocks of an axis that hold tokens, in order; only for tokens in a row, neither interleaved nor cyclic."""
    origins = range(partition.shift - partition.window, partition.length, partition.window)
    blocks = (_block(partition, origin) for origin in origins)
    return tuple(block for block in blocks if block.tokens > 0)


def axis_slots(partition: AxisPartition) -> Tensor:
    """``[groups, window]``, int64: the token in every slot of every group of an axis, or ``ABSENT`` or ``PADDING``."""
    if partition.cyclic and partition.shift:
        return _rolled_slots(partition)
    window, interval, end = partition.window, partition.interval, partition.full_extent
    start = partition.shift - window if partition.shift else 0
    regions = -(-(end - start) // (window * interval))
    place = start + torch.arange(regions * window * interval).view(regions, window, interval)
    place = place.transpose(1, 2).flatten(0, 1)
    beyond = torch.where(place < end, PADDING if partition.padded else ABSENT, ABSENT)
    return torch.where(place < partition.length, place.clamp(min=ABSENT), beyond)


def map_slots(rows: AxisPartition, columns: AxisPartition) -> Tensor:
    """``[groups, slots]``, int64: the token, in raster order, in every slot of every group of a map, or ``ABSENT`` or
    ``PADDING``. Groups and their slots are pairs of those of the axes, in row-major order."""
    row, column = axis_slots(rows)[:, None, :, None], axis_slots(columns)[None, :, None, :]
    token = torch.where((row >= 0) & (column >= 0), row * columns.length + column, PADDING)
    token = torch.where((row == ABSENT) | (column == ABSENT), ABSENT, token)
    return token.flatten(2).flatten(0, 1)


def attended_slots(partition: AxisPartition) -> int:
    """Number of (token, slot) pairs along an axis; on a map the counts of its axes multiply."""
    if partition.interval == 1 and not partition.cyclic:
        return sum(block.tokens * block.slots for block in axis_blocks(partition))
    slots = axis_slots(partition)
    return int(((slots >= 0).sum(1) * (slots != ABSENT).sum(1)).sum())


def check_partitions(partitions: tuple[AxisPartition, ...]) -> None:
    """Raise ``ArgumentError`` for an axis on which the partition has no meaning."""
    for axis, partition in enumerate(partitions):
        if partition.window < 1:
            raise ArgumentError(f"window_size must be at least 1, got {partition.window} for axis {axis}")
        if not 0 <= partition.shift < partition.window:
            raise ArgumentError(
                f"shift {partition.shift} lies outside 0 .. {partition.window - 1} on axis {axis}: "
                f"shifts repeat with the window, use {partition.shift % partition.window}"
            )


@dataclass(frozen=True)
class Grouping:
    """How a map, padded to whole regions, falls into unshifted groups; each pair is (rows, columns).

    Attributes:
        group: tokens of a group.
        interval: from a token of a group to the next one; 1 gives windows.
        regions: how many regions of ``group * interval`` tokens there are.
        before, after: padding in front of the map and behind it, in tokens.
    """

    group: Pair
    interval: Pair
    regions: Pair
    before: Pair
    after: Pair

    @classmethod
    def covering(cls, sides: Pair, group: Pair, interval: Pair, centered: bool = False) -> Grouping:
        """The fewest regions that cover a map of these sides, its padding behind it or (``centered``) half in front."""
        extents = zip(sides, group, interval, strict=True)
        rows, columns = (-(-side // (size * step)) for side, size, step in extents)
        below = rows * group[0] * interval[0] - sides[0]
        right = columns * group[1] * interval[1] - sides[1]
        above, left = (below // 2, right // 2) if centered else (0, 0)
        return cls(group, interval, (rows, columns), (above, left), (below - above, right - left))

    @property
    def pads(self) -> bool:
        """Whether there is padding; sizes that are not yet known, in export, count as padded."""
        return any(not isinstance(side, int) or side > 0 for side in self.before + self.after)

    @property
    def padded_sides(self) -> Pair:
        """Rows and columns of the map with its padding."""
        rows, columns = (
            count * size * step for count, size, step in zip(self.regions, self.group, self.interval, strict=True)
        )
        return rows, columns

    @property
    def sides(self) -> Pair:
        """Rows and columns of the map."""
        rows, columns = (
            padded - front - behind
            for padded, front, behind in zip(self.padded_sides, self.before, self.after, strict=True)
        )
        return rows, columns

    @property
    def slots(self) -> int:
        """Tokens of a group, padding included."""
        return self.group[0] * self.group[1]

    @property
    def groups(self) -> int:
        """Number of groups on the map."""
        return self.regions[0] * self.regions[1] * self.interval[0] * self.interval[1]


def padded_map(source: Tensor, grouping: Grouping) -> Tensor:
    """``[B, H, W, ...]`` with zeros up to whole regions."""
    (top, left), (bottom, right) = grouping.before, grouping.after
    return F.pad(source, (0, 0) * (source.ndim - 3) + (left, right, top, bottom)) if grouping.pads else source


def cropped_map(source: Tensor, grouping: Grouping) -> Tensor:
    """The inverse of ``padded_map``."""
    (top, left), (bottom, right) = grouping.before, grouping.after
    if not grouping.pads:
        return source
    # Not a slice: its strides would bind an exported program to maps that need padding.
    return F.pad(source, (0, 0) * (source.ndim - 3) + (-left, -right, -top, -bottom))


def into_groups(source: Tensor, grouping: Grouping) -> Tensor:
    """``[B, H, W, ...]`` of a map that ``padded_map`` padded, to ``[B, groups, slots, ...]``.

    Groups are in row-major order of regions, those of one region in row-major order of their first tokens.
    """
    (rows, columns), (down, right), (high, wide) = grouping.group, grouping.interval, grouping.regions
    places = source.unflatten(2, (wide, columns, right)).unflatten(1, (high, rows, down))
    places = places.permute(0, 1, 4, 3, 6, 2, 5, *range(7, places.ndim))
    return places.flatten(5, 6).flatten(1, 4)


def from_groups(groups: Tensor, grouping: Grouping) -> Tensor:
    """The inverse of ``into_groups``."""
    places = groups.unflatten(2, grouping.group).unflatten(1, (*grouping.regions, *grouping.interval))
    places = places.permute(0, 1, 5, 3, 2, 6, 4, *range(7, places.ndim))
    return places.flatten(4, 6).flatten(1, 3)


def visible_keys(grouping: Grouping, height: int, width: int, device: torch.device) -> Tensor:
    """``[groups, slots]``, bool: which slots hold tokens of the ``height x width`` map, rather than padding."""
    return into_groups(padded_map(torch.ones(1, height, width, 1, device=device), grouping), grouping)[..., 0][0] > 0


def _block(partition: AxisPartition, origin: int) -> AxisBlock:
    start, end = max(origin, 0), origin + partition.window
    tokens, slots = min(end, partition.length) - start, min(end, partition.extent) - start
    return AxisBlock(start, tokens, start - origin, slots)


def _rolled_slots(partition: AxisPartition) -> Tensor:
    """The groups of the rolled axis; the last one is two, cut ``shift`` slots before the end of the padded axis."""
    length, shift, end = partition.length, partition.shift, partition.full_extent
    place = torch.arange(end).view(-1, partition.window)
    token = torch.where(place < length, (place + shift) % length, PADDING if partition.padded else ABSENT)
    last = place[-1] < end - shift
    parts = (torch.where(last, token[-1], ABSENT), torch.where(last, ABSENT, token[-1]))
    return torch.cat([token[:-1], torch.stack(parts)])
