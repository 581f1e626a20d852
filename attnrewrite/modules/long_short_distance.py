"""Long and short distance attention (LSDA) of CrossFormer (Wang et al., ICLR 2022)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, nearest
from ..ir.heads import as_pair
from .dynamic_position_bias import DynamicPositionBias, central_table, relative_index

BIASES = ("dpb", "table", "both", "none")
PADDINGS = ("mask", "phantom")
SMALL_MAPS = ("shrink", "global")


class Grouping(NamedTuple):
    """How a map falls into groups: their rows and columns, the steps between their tokens, how many regions they come
    in, and the padding in front and behind, per axis."""

    group: tuple[int, int]
    interval: tuple[int, int]
    regions: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def pads(self) -> bool:
        """Whether there is padding; sizes that are not yet known, in export, count as padded."""
        return any(not isinstance(side, int) or side > 0 for side in self.before + self.after)


class LongShortDistanceAttention(nn.Module):
    """Attention inside groups of a map of any size: of neighbours (short), or of tokens ``interval`` apart (long).

    The map is cut into regions of ``group_size * interval`` tokens a side (short: an interval of 1). Tokens at the same
    place modulo the interval in the same region form a group. What the size of the map decides is decided at each
    call; an exported program with sizes that vary keeps the branches of the map it was traced with: more than one
    region an axis, or a map that a group covers.

    Args:
        dim: channels in and out.
        num_heads: divides ``dim``.
        group_size: rows and columns of a group, or one number for both.
        interval: None for short distance, a number of steps for long, or ``"adaptive"`` for long with the fewest steps
            that make one region of the map: ``ceil(H / group_size)`` (with ``small_map="global"`` of the longer side).
        position_bias: ``"dpb"``, a `DynamicPositionBias`; ``"table"``, a trained table, as Swin's; ``"both"``, their
            sum; ``"none"``.
        padding: at sides that regions do not divide. ``"mask"`` hides the padded keys (CrossFormer); ``"phantom"``
            leaves them, with the biases of the key and value projection as key and value (Swin).
        centred: pad half in front, instead of all behind.
        small_map: for maps that a group covers on an axis; attention is then short. ``"shrink"`` cuts groups down to
            the shorter side (CrossFormer's classification models), ``"global"`` attends to the whole map (its dense
            backbones). On a square map these are the same.
        qkv_bias: whether the projections of query, key and value have biases.
        scale: of the dot products; None is ``head_dim ** -0.5``.

    Raises:
        ArgumentError: for arguments that have no meaning or do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int | tuple[int, int],
        interval: int | str | None = None,
        *,
        position_bias: str = "dpb",
        padding: str = "mask",
        centred: bool = False,
        small_map: str = "shrink",
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.group_size = as_pair(group_size)
        self._check(dim, num_heads, interval)
        check_choice("position_bias", position_bias, BIASES)
        check_choice("padding", padding, PADDINGS)
        check_choice("small_map", small_map, SMALL_MAPS)
        self.num_heads, self.interval = num_heads, interval
        self.position_bias, self.padding, self.centred, self.small_map = position_bias, padding, centred, small_map
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.pos = DynamicPositionBias(dim // 16, num_heads) if position_bias in ("dpb", "both") else None
        self.relative_position_bias_table: Tensor | None = None
        if position_bias in ("table", "both"):
            entries = (2 * self.group_size[0] - 1) * (2 * self.group_size[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _check(self, dim: int, num_heads: int, interval: int | str | None) -> None:
        if num_heads < 1 or dim % num_heads:
            raise ArgumentError(f"num_heads: must divide dim={dim}, got {num_heads}")
        if min(self.group_size) < 1:
            raise ArgumentError(f"group_size: must be at least 1, got {self.group_size}")
        if isinstance(interval, str) and interval != "adaptive":
            raise ArgumentError(f"interval: must be a number, 'adaptive' or None, got {interval!r}")
        if isinstance(interval, int) and interval < 1:
            raise ArgumentError(f"interval: must be at least 1, got {interval}")

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape.

        Raises:
            ArgumentError: the groups of this map are larger than the position table.
        """
        batch, height, width = source.shape[:3]
        grouping = self.grouping(height, width)
        rows, columns = grouping.group
        if grouping.pads:
            (top, left), (bottom, right) = grouping.before, grouping.after
            source = F.pad(source, (0, 0, left, right, top, bottom))
        groups = split_groups(self.qkv(source), grouping)
        query, key, value = groups.flatten(0, 1).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias(rows, columns)
        bias = None if bias is None else bias.to(query.dtype)
        if grouping.pads and self.padding == "mask":
            bias = self._masked(bias, grouping, height, width, query)
        mixed = F.scaled_dot_product_attention(query, key, value, bias, scale=self.scale)
        mixed = mixed.transpose(1, 2).flatten(-2).unflatten(0, (batch, -1))
        mixed = join_groups(mixed, grouping)
        if grouping.pads:
            # Not a slice: its strides would bind an exported program to maps that need padding.
            mixed = F.pad(mixed, (0, 0, -left, -right, -top, -bottom))
        return self.proj(mixed)

    def grouping(self, height: int, width: int) -> Grouping:
        """The groups of a map of this size."""
        sides, group, interval = (height, width), self.group_size, self.interval
        if height <= group[0] or width <= group[1]:
            shorter = min(sides)
            shrunk = (min(group[0], shorter), min(group[1], shorter))
            group, interval = (sides if self.small_map == "global" else shrunk), None
        if interval == "adaptive":
            side = max(sides) if self.small_map == "global" else height
            steps = (-(-side // group[0]), -(-side // group[1]))
        else:
            steps = as_pair(1 if interval is None else int(interval))
        regions = [-(-side // (size * step)) for side, size, step in zip(sides, group, steps, strict=True)]
        extents = [count * size * step for count, size, step in zip(regions, group, steps, strict=True)]
        missing = [extent - side for extent, side in zip(extents, sides, strict=True)]
        before = [short // 2 if self.centred else 0 for short in missing]
        after = [short - front for short, front in zip(missing, before, strict=True)]
        return Grouping(group, steps, (regions[0], regions[1]), (before[0], before[1]), (after[0], after[1]))

    def bias(self, rows: int, columns: int) -> Tensor | None:
        """``[1, num_heads, n, n]`` of the ``n = rows * columns`` queries and keys of a group."""
        entries = None if self.pos is None else self.pos.table(rows, columns)
        if self.relative_position_bias_table is not None:
            held = central_table(self.relative_position_bias_table, self.group_size, (rows, columns))
            entries = held if entries is None else entries + held
        if entries is None:
            return None
        return entries[relative_index(rows, columns, entries.device)].permute(2, 0, 1)[None]

    def _masked(self, bias: Tensor | None, grouping: Grouping, height: int, width: int, query: Tensor) -> Tensor:
        """``[B * groups, 1 or num_heads, 1 or n, n]``: the bias, and minus infinity at padded keys."""
        visible = visible_keys(grouping, height, width, query.device)
        # Groups of nothing but padding are thrown away, but a softmax over no key would make their gradients NaN.
        visible = visible | ~visible.any(-1, keepdim=True)
        groups = visible.shape[0]
        bias = query.new_zeros(1, 1, 1, 1) if bias is None else bias
        masked = torch.where(visible[:, None, None], bias, -math.inf)
        return masked.expand(query.shape[0] // groups, -1, -1, -1, -1).flatten(0, 1)

    def extra_repr(self) -> str:
        return (
            f"group_size={self.group_size}, interval={self.interval}, num_heads={self.num_heads}, "
            f"position_bias={self.position_bias!r}, padding={self.padding!r}, small_map={self.small_map!r}"
        )


def split_groups(source: Tensor, grouping: Grouping) -> Tensor:
    """``[B, H, W, C]`` of a padded map to ``[B, groups, n, C]``."""
    (rows, columns), (down, right), (high, wide) = grouping.group, grouping.interval, grouping.regions
    places = source.unflatten(2, (wide, columns, right)).unflatten(1, (high, rows, down))
    return places.permute(0, 1, 4, 3, 6, 2, 5, 7).flatten(5, 6).flatten(1, 4)


def join_groups(groups: Tensor, grouping: Grouping) -> Tensor:
    """The inverse of `split_groups`."""
    places = groups.unflatten(2, grouping.group).unflatten(1, (*grouping.regions, *grouping.interval))
    return places.permute(0, 1, 5, 3, 2, 6, 4, 7).flatten(4, 6).flatten(1, 3)


def visible_keys(grouping: Grouping, height: int, width: int, device: torch.device) -> Tensor:
    """``[groups, n]``: which keys are tokens of the map, rather than padding."""
    (top, left), (bottom, right) = grouping.before, grouping.after
    inside = F.pad(torch.ones(1, height, width, 1, device=device), (0, 0, left, right, top, bottom))
    return split_groups(inside, grouping)[0, :, :, 0] > 0


def check_choice(argument: str, value: str, known: tuple[str, ...]) -> None:
    """Raises:
    ArgumentError: the value is none of the known ones.
    """
    if value not in known:
        raise ArgumentError(f"{argument}: must be one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")
