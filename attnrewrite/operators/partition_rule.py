"""Which block of a partition a token of grouped attention belongs to, axis by axis.

Token c belongs to block floor((c - shift) / window). With a shift the first block holds the ``shift`` tokens before the
first full window. This is the shifted window of Swin (Liu et al. 2021) without its cyclic roll: a rolled window that
mixes opposite borders is masked so that it falls apart into exactly these truncated blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..errors import ArgumentError


@dataclass(frozen=True)
class AxisPartition:
    """The partition of one axis; ``padded`` axes count as padded at the end to a multiple of the window."""

    length: int
    window: int
    shift: int = 0
    padded: bool = False

    @property
    def extent(self) -> int:
        """Number of slots: tokens, and the padding after them if it counts."""
        return -(-self.length // self.window) * self.window if self.padded else self.length


@dataclass(frozen=True)
class AxisBlock:
    """One block: tokens ``start .. start + tokens``, at window positions ``first_slot ..``, of ``slots`` present ones.

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
    """The blocks of an axis that hold tokens, in order."""
    origins = range(partition.shift - partition.window, partition.length, partition.window)
    blocks = (_block(partition, origin) for origin in origins)
    return tuple(block for block in blocks if block.tokens > 0)


def attended_slots(partition: AxisPartition) -> int:
    """Number of (token, slot) pairs along an axis; on a map the counts of its axes multiply."""
    return sum(block.tokens * block.slots for block in axis_blocks(partition))


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


def _block(partition: AxisPartition, origin: int) -> AxisBlock:
    start, end = max(origin, 0), origin + partition.window
    tokens, slots = min(end, partition.length) - start, min(end, partition.extent) - start
    return AxisBlock(start, tokens, start - origin, slots)
