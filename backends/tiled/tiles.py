"""Moving between maps ``[B, *grid, heads, channels]`` and tiles ``[tiles, heads, points, channels]``.

Tiles are strided views of the map, overlapping where key tiles do, so that reading them is one copy without indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from torch import Tensor

Index = tuple[slice, ...]


@dataclass(frozen=True)
class AxisTiles:
    """Along one axis: ``count`` tiles of ``size`` tokens, one every ``step`` tokens from ``start``.

    With a dilation the tokens of a tile are that far apart, and the tiles repeat in ``groups`` dilation groups from
    ``first_group``; start, size and step count inside a group.
    """

    start: int
    size: int
    step: int
    count: int
    first_group: int = 0
    groups: int = 1
    dilation: int = 1


Tiling = tuple[AxisTiles, ...]


def lead_shape(batch: int, tiling: Tiling) -> tuple[int, ...]:
    """How tiles are counted: image, dilation groups, position."""
    return (batch, *(axis.groups for axis in tiling), *(axis.count for axis in tiling))


def tile_view(source: Tensor, tiling: Tiling) -> Tensor:
    """View a map as ``[B, *groups, *counts, heads, *sizes, channels]``."""
    batch, *along, head, channel = source.stride()
    axes = list(zip(tiling, along, strict=True))
    sizes = (
        *lead_shape(source.shape[0], tiling),
        source.shape[-2],
        *(t.size for t in tiling),
        source.shape[-1],
    )
    steps = [stride * axis.dilation for axis, stride in axes]
    counts = [step * axis.step for (axis, _), step in zip(axes, steps, strict=True)]
    offset = sum(
        stride * axis.first_group + step * axis.start for (axis, stride), step in zip(axes, steps, strict=True)
    )
    strides = (batch, *along, *counts, head, *steps, channel)
    return source.as_strided(sizes, strides, source.storage_offset() + offset)


def chunks(lead: tuple[int, ...], limit: int) -> Iterator[Index]:
    """Cut the tiles into runs of at most ``limit`` (at least one), as indices into the leading dimensions."""
    split = len(lead)
    while split and prod(lead[split - 1 :]) <= limit:
        split -= 1
    if not split:
        yield ()
        return
    run = max(1, limit // prod(lead[split:]))
    outer = (range(size) for size in lead[: split - 1])
    for *fixed, first in product(*outer, range(0, lead[split - 1], run)):
        yield (*(slice(place, place + 1) for place in fixed), slice(first, first + run))


def read(view: Tensor, index: Index) -> Tensor:
    """Copy a run of tiles to ``[tiles, heads, points, channels]``."""
    chosen = view[index] if index else view
    rank = view.dim() // 3 - 1
    *lead, heads = chosen.shape[: -rank - 1]
    return chosen.reshape(prod(lead), heads, prod(chosen.shape[-rank - 1 : -1]), chosen.shape[-1])


def write(view: Tensor, index: Index, tiles: Tensor) -> None:
    """Store a run of tiles in their map, which they must not overlap in."""
    target = view[index] if index else view
    target.copy_(tiles.reshape(target.shape))


def accumulate(target: Tensor, tiling: Tiling, index: Index, tiles: Tensor) -> None:
    """Add a run of tiles to their map. Overlapping tiles are added in pieces that do not overlap."""
    rank = len(tiling)
    whole = tiles.view(
        *_run_shape(target.shape[0], tiling, index),
        tiles.shape[1],
        *(t.size for t in tiling),
        tiles.shape[-1],
    )
    for pieces in product(*map(_pieces, tiling)):
        view = tile_view(target, pieces)
        part = whole
        for axis, (piece, own) in enumerate(zip(pieces, tiling, strict=True)):
            part = part.narrow(axis - rank - 1, piece.start - own.start, piece.size)
        (view[index] if index else view).add_(part)


def _run_shape(batch: int, tiling: Tiling, index: Index) -> tuple[int, ...]:
    lead = lead_shape(batch, tiling)
    chosen = tuple(len(range(size)[place]) for size, place in zip(lead, index, strict=False))
    return chosen + lead[len(chosen) :]


def _pieces(axis: AxisTiles) -> list[AxisTiles]:
    if axis.count == 1:
        return [axis]
    offsets = range(0, axis.size, axis.step)
    return [replace(axis, start=axis.start + at, size=min(axis.step, axis.size - at)) for at in offsets]
