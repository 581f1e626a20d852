"""Which tokens a query sees: the vocabulary of ``AttentionSite.keys``, and the map it speaks of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .image_map import ImageMap


@dataclass(frozen=True)
class Grid:
    """Tokens on a map: ``height * width`` in raster order after ``prefix_tokens`` (class, distillation, register).

    ``image`` says how its sides follow the image, where that was seen.
    """

    height: int
    width: int
    prefix_tokens: int = 0
    image: ImageMap | None = field(default=None, compare=False, repr=False)

    @property
    def seen(self) -> list[Grid]:
        """This map as it was on every look at the model."""
        maps = ((self.height, self.width),) if self.image is None else self.image.maps
        return [Grid(*sides, self.prefix_tokens) for sides in maps]

    @property
    def tokens(self) -> int:
        return self.height * self.width + self.prefix_tokens

    def __str__(self) -> str:
        prefix = f"+{self.prefix_tokens}" if self.prefix_tokens else ""
        return f"{self.height}x{self.width}{prefix}"


@dataclass(frozen=True)
class Global:
    """Every query sees every token."""

    def __str__(self) -> str:
        return "global"


@dataclass(frozen=True)
class Window:
    """Token ``c`` of an axis is in block ``floor((c - shift) / size)``; border blocks are truncated, nothing wraps.

    ``phantom``: the map is padded at its end to a multiple of ``size`` and the padded slots count as keys. ``cyclic``:
    the map is rolled before it is padded, so that on a padded map the rolled-over tokens join the last real ones; on a
    map that ``size`` divides it makes no difference. An axis that fits into one block is not shifted.
    """

    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    phantom: bool = False
    cyclic: bool = False

    ABSENT: ClassVar[int] = -1
    PHANTOM: ClassVar[int] = -2

    def slots(self, grid: Grid) -> Tensor:
        """``[blocks, slots]``: the token in every slot of every block, or ``ABSENT`` or ``PHANTOM``."""
        rows = self._axis_slots(grid.height, 0)[:, None, :, None]
        columns = self._axis_slots(grid.width, 1)[None, :, None, :]
        inside = (rows >= 0) & (columns >= 0)
        token = torch.where(inside, rows * grid.width + columns, self.PHANTOM)
        token = torch.where((rows == self.ABSENT) | (columns == self.ABSENT), self.ABSENT, token)
        return token.flatten(2).flatten(0, 1)

    def blocks(self, grid: Grid) -> tuple[int, int]:
        """How many blocks cover each axis, if nothing is shifted."""
        return -(-grid.height // self.size[0]), -(-grid.width // self.size[1])

    def divides(self, grid: Grid) -> bool:
        return grid.height % self.size[0] == 0 and grid.width % self.size[1] == 0

    def axis_pairs(self, length: int, axis: int = 0) -> int:
        """Pairs of a token and an attended slot of its block along an axis; on a map those of both axes multiply."""
        slots = self._axis_slots(length, axis)
        return int(((slots >= 0).sum(1) * (slots != self.ABSENT).sum(1)).sum())

    def _axis_slots(self, length: int, axis: int) -> Tensor:
        size = self.size[axis]
        padded = -(-length // size) * size
        shift = self.shift[axis] if padded > size else 0
        beyond = self.PHANTOM if self.phantom else self.ABSENT
        if self.cyclic and shift:
            return self._rolled_slots(length, padded, size, shift, beyond)
        start = shift - size if shift else 0
        blocks = -(-(padded - start) // size)
        place = start + torch.arange(blocks * size).view(blocks, size)
        return torch.where(
            place < length, place.clamp(min=self.ABSENT), torch.where(place < padded, beyond, self.ABSENT)
        )

    def _rolled_slots(self, length: int, padded: int, size: int, shift: int, beyond: int) -> Tensor:
        """The blocks of the rolled map; the last one is two, cut ``shift`` slots before the end of the padded map."""
        place = torch.arange(padded).view(-1, size)
        token = torch.where(place < length, (place + shift) % length, beyond)
        last = place[-1] < padded - shift
        parts = (torch.where(last, token[-1], self.ABSENT), torch.where(last, self.ABSENT, token[-1]))
        return torch.cat([token[:-1], torch.stack(parts)])

    def __str__(self) -> str:
        shift = "" if self.shift == (0, 0) else f", shift {pair_text(self.shift)}"
        flags = "".join(f", {name}" for name in ("phantom", "cyclic") if getattr(self, name))
        return f"window({pair_text(self.size)}{shift}{flags})"


@dataclass(frozen=True)
class Interleaved:
    """Groups of ``group`` tokens that lie ``interval`` apart: MaxViT's grid attention (Tu et al. 2022), CrossFormer's
    long distance attention (Wang et al. 2022).

    An axis is cut into regions of ``group * interval`` tokens; token ``c`` of a region is in its group
    ``c % interval``. Slots beyond the map, in the last region, are not attended to.
    """

    group: tuple[int, int]
    interval: tuple[int, int]
    phantom: ClassVar[bool] = False

    @property
    def size(self) -> tuple[int, int]:
        """Tokens of a group per axis, as a window's."""
        return self.group

    def slots(self, grid: Grid) -> Tensor:
        """``[groups, slots]``: the token in every slot of every group, or ``Window.ABSENT``."""
        rows = self._axis_slots(grid.height, 0)[:, None, :, None]
        columns = self._axis_slots(grid.width, 1)[None, :, None, :]
        inside = (rows >= 0) & (columns >= 0)
        return torch.where(inside, rows * grid.width + columns, Window.ABSENT).flatten(2).flatten(0, 1)

    def is_one_region(self, grid: Grid) -> bool:
        """Whether a group reaches over the whole map: then it is every token of the same residues."""
        sides = (grid.height, grid.width)
        return all(g * i == side for g, i, side in zip(self.group, self.interval, sides, strict=True))

    def _axis_slots(self, length: int, axis: int) -> Tensor:
        group, interval = self.group[axis], self.interval[axis]
        regions = -(-length // (group * interval))
        place = torch.arange(regions * group * interval).view(regions, group, interval).transpose(1, 2).flatten(0, 1)
        return torch.where(place < length, place, Window.ABSENT)

    def __str__(self) -> str:
        return f"interleaved({pair_text(self.group)}, interval {pair_text(self.interval)})"


@dataclass(frozen=True)
class Reduced:
    """Every query sees a smaller map made from the tokens: by a strided convolution, or by pooling."""

    height: int
    width: int
    reducer: str
    image: ImageMap | None = field(default=None, compare=False, repr=False)

    @property
    def grid(self) -> Grid:
        """The smaller map."""
        return Grid(self.height, self.width, image=self.image)

    def __str__(self) -> str:
        return f"reduced({self.height}x{self.width}, {self.reducer})"


@dataclass(frozen=True)
class Tokens:
    """Every query sees ``count`` keys that are not simply the queries' own tokens."""

    count: int

    def __str__(self) -> str:
        return f"tokens({self.count})"


KeySet = Global | Window | Interleaved | Reduced | Tokens

MapGroups = Window | Interleaved
"""Keys of sites that work on a map: a partition of it into groups, whose tokens see each other."""


def pair_text(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


__all__ = [
    "Global", "Grid", "Interleaved", "KeySet", "MapGroups", "Reduced", "Tokens", "Window", "pair_text",
]  # fmt: skip
