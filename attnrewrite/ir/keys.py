"""Which tokens a query sees: the vocabulary of ``AttentionSite.keys``, and the map it speaks of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..operators import partition_rule
from ..operators.partition_rule import AxisPartition, attended_slots, map_slots
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


_WINDOW_FLAGS = {"padding_keys": "padding keys", "rolled_first": "rolled before padding"}


@dataclass(frozen=True)
class Window:
    """Token ``c`` of an axis is in block ``floor((c - shift) / size)``; border blocks are truncated, nothing wraps.

    ``padding_keys``: the map is padded at its end to a multiple of ``size`` and the padded slots count as keys.
    ``rolled_first``: the map is rolled before it is padded, so that on a padded map the rolled-over tokens join the
    last real ones; on a map that ``size`` divides it makes no difference. An axis that fits into one block is not
    shifted.
    """

    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    padding_keys: bool = False
    rolled_first: bool = False

    ABSENT: ClassVar[int] = partition_rule.ABSENT
    PADDING: ClassVar[int] = partition_rule.PADDING

    def slots(self, grid: Grid) -> Tensor:
        """``[blocks, slots]``: the token in every slot of every block, or ``ABSENT`` or ``PADDING``."""
        return map_slots(self.partition(grid.height, 0), self.partition(grid.width, 1))

    def partition(self, length: int, axis: int) -> AxisPartition:
        """How the window cuts an axis of so many tokens."""
        size = self.size[axis]
        shift = self.shift[axis] if length > size else 0
        return AxisPartition(length, size, shift, self.padding_keys, rolled=self.rolled_first)

    def blocks(self, grid: Grid) -> tuple[int, int]:
        """How many blocks cover each axis, if nothing is shifted."""
        return -(-grid.height // self.size[0]), -(-grid.width // self.size[1])

    def divides(self, grid: Grid) -> bool:
        return grid.height % self.size[0] == 0 and grid.width % self.size[1] == 0

    def axis_pairs(self, length: int, axis: int = 0) -> int:
        """Pairs of a token and an attended slot of its block along an axis; on a map those of both axes multiply."""
        return attended_slots(self.partition(length, axis))

    def __str__(self) -> str:
        shift = "" if self.shift == (0, 0) else f", shift {pair_text(self.shift)}"
        flags = "".join(f", {text}" for flag, text in _WINDOW_FLAGS.items() if getattr(self, flag))
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
    padding_keys: ClassVar[bool] = False

    @property
    def size(self) -> tuple[int, int]:
        """Tokens of a group per axis, as a window's."""
        return self.group

    def slots(self, grid: Grid) -> Tensor:
        """``[groups, slots]``: the token in every slot of every group, or ``Window.ABSENT``."""
        rows, columns = (
            AxisPartition(length, group, interval=interval)
            for length, group, interval in zip((grid.height, grid.width), self.group, self.interval, strict=True)
        )
        return map_slots(rows, columns)

    def is_one_region(self, grid: Grid) -> bool:
        """Whether a group reaches over the whole map: then it is every token of the same residues."""
        sides = (grid.height, grid.width)
        return all(g * i == side for g, i, side in zip(self.group, self.interval, sides, strict=True))

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
