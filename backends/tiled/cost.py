"""A model of the run time of tiled attention, by which tiles are chosen.

The constants are rounded fits to measured runs (two cores of an x86 server; for accelerators coarse estimates). Only
ratios matter: a wrong one costs time, never correctness.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """How often a map is attended to, and how many channels (query and value together) take part."""

    device: str
    images_and_heads: int
    channels: int


@dataclass(frozen=True)
class Rates:
    """Seconds per (query, key) pair, per pair and channel, per copied number, per tile, and per block."""

    pair: float
    product: float
    copy: float
    tile: float
    block: float


CPU = Rates(pair=1.4e-9, product=1.5e-11, copy=2.5e-10, tile=2e-6, block=2e-4)
ACCELERATOR = Rates(pair=4e-12, product=1e-13, copy=2e-12, tile=1e-9, block=2e-4)


def seconds(work: Work, pairs: int, keys: int, tiles: int, blocks: int) -> float:
    """Modelled time; pairs, keys and tiles are those of one image and head."""
    rates = CPU if work.device == "cpu" else ACCELERATOR
    per_map = pairs * (rates.pair + work.channels * rates.product) + keys * work.channels * rates.copy
    return work.images_and_heads * (per_map + tiles * rates.tile) + blocks * rates.block
