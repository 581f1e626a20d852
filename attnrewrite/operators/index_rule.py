"""Which keys a query of neighborhood attention sees, axis by axis, and which entry of a relative table it adds.

The rule is NATTEN's (Hassani et al. 2023, Neighborhood Attention Transformer; Hassani and Shi 2022, dilation; Hassani
et al. 2025, Generalized Neighborhood Attention, stride). Axes are independent: a query's neighborhood on a map is the
Cartesian product of its windows on the axes. Unlike NATTEN a kernel size of 1 is legal, and so is the other boundary:
a window around its query of which places beyond the map are absent (Shi 2024, TransNeXt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError

Scalar = TypeVar("Scalar", int, bool)


CLAMP, MASK = "clamp", "mask"
BOUNDARIES = (CLAMP, MASK)
"""Windows at a border slide inward and keep their size, or stay around their query and lose what lies beyond."""


@dataclass(frozen=True)
class AxisRule:
    """The neighborhood along ``length`` tokens: keys ``dilation`` apart, ``stride`` queries a window.

    Queries that share a window begin at ``offset`` (and at every stride from there); ``boundary`` is one of
    ``BOUNDARIES``, and causal windows are clamped ones that end at their query.
    """

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    offset: int = 0
    boundary: str = CLAMP

    def window(self, query: int) -> range:
        """Keys of one query, ascending: ``kernel_size`` of them, as windows slide inward; fewer if causal or masked."""
        group, position = query % self.dilation, query // self.dilation
        group_length = -(-(self.length - group) // self.dilation)
        shared = (position - self.offset) // self.stride * self.stride + self.offset
        if self.is_causal:
            leader = min(shared + self.stride - 1, group_length - 1)
            first, stop = max(leader - self.kernel_size + 1, 0), position + 1
        elif self.boundary == MASK:
            start = shared + self.stride // 2 - self.kernel_size // 2
            first, stop = max(start, 0), min(start + self.kernel_size, group_length)
        else:
            leader = min(shared + self.stride // 2, group_length - 1)
            first = min(max(leader - self.kernel_size // 2, 0), group_length - self.kernel_size)
            stop = first + self.kernel_size
        return range(first * self.dilation + group, stop * self.dilation + group, self.dilation)

    @property
    def bias_reach(self) -> int:
        """Steps before the query at which the relative bias begins; where windows slide or are shared it has an entry
        for every offset that any of their keys can have."""
        return self.kernel_size // 2 if self.is_centered else self.kernel_size - 1

    @property
    def bias_length(self) -> int:
        """Entries of the relative bias along the axis."""
        return self.kernel_size if self.is_centered else 2 * self.kernel_size - 1

    @property
    def is_centered(self) -> bool:
        """Whether every window has its query in its middle, whatever part of it lies on the map."""
        return self.boundary == MASK and self.stride == 1 and not self.is_causal


@dataclass(frozen=True)
class AxisTable:
    """An ``AxisRule`` as int64 (and bool) tensors of shape ``[length, kernel_size]``.

    ``keys`` are in ascending order; absent ones have ``valid`` False and repeat a key on the map, so every index is
    legal. ``bias_index`` is the entry of the relative position bias, ``(key - query) / dilation`` from ``bias_reach``
    steps before.
    """

    keys: Tensor
    valid: Tensor
    bias_index: Tensor


@lru_cache(maxsize=256)
def windows(rule: AxisRule) -> tuple[range, ...]:
    """The window of every query of an axis."""
    return tuple(rule.window(query) for query in range(rule.length))


def axis_table(rule: AxisRule, device: torch.device) -> AxisTable:
    """The windows of an axis as index tensors on ``device``: arithmetic on positions, so that sizes may be symbolic."""
    query = torch.arange(rule.length, device=device)[:, None]
    group, position = query % rule.dilation, query // rule.dilation
    last = (rule.length - group + rule.dilation - 1) // rule.dilation - 1
    shared = (position - rule.offset).div(rule.stride, rounding_mode="floor") * rule.stride + rule.offset
    if rule.is_causal:
        leader = torch.minimum(shared + rule.stride - 1, last)
        first, stop = (leader - rule.kernel_size + 1).clamp(min=0), position + 1
    elif rule.boundary == MASK:
        first, stop = shared + rule.stride // 2 - rule.kernel_size // 2, last + 1
    else:
        leader = torch.minimum(shared + rule.stride // 2, last)
        first = torch.minimum((leader - rule.kernel_size // 2).clamp(min=0), last + 1 - rule.kernel_size)
        stop = last + 1
    place = first + torch.arange(rule.kernel_size, device=device)
    valid = (place >= 0) & (place < stop)
    place = torch.minimum(place.clamp(min=0), stop - 1)
    return AxisTable(place * rule.dilation + group, valid, place - position + rule.bias_reach)


def attended_pairs(rule: AxisRule) -> int:
    """Number of (query, key) pairs along an axis; on a map the counts of its axes multiply."""
    if rule.boundary == CLAMP and not rule.is_causal:
        return rule.length * rule.kernel_size
    return sum(map(len, windows(rule)))


def axis_mask(queries: int, keys: int, kernel_size: int, dilation: int) -> Tensor:
    """``[queries, keys]``, bool: the neighborhood rule along one axis; that of ``keys`` may be coarser."""
    rule = AxisRule(keys, kernel_size, dilation=dilation)
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for query in range(queries):
        seen[query, list(rule.window(query * keys // queries))] = True
    return seen


def window_on_map(height: int, width: int, window_size: int, device: torch.device) -> Tensor:
    """``[H * W, window_size ** 2]``, bool: which places of the window around every pixel are on the map."""
    rows, columns = (axis_table(AxisRule(side, window_size, boundary=MASK), device).valid for side in (height, width))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def relative_offset(size: tuple[int, int]) -> Tensor:
    """``[n, n]``, int64: flat index of key minus query in a ``(2h-1) x (2w-1)`` table, for the n = h * w tokens."""
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    vertical = rows[None, :] - rows[:, None] + size[0] - 1
    horizontal = columns[None, :] - columns[:, None] + size[1] - 1
    index = vertical[:, None, :, None] * (2 * size[1] - 1) + horizontal[None, :, None, :]
    return index.reshape(size[0] * size[1], -1)


def relative_entries(size: tuple[int, int]) -> Tensor:
    """``[(2h-1)(2w-1)]``, int64: a flat position in ``n * n`` that holds each entry of a relative table."""
    offset = relative_offset(size).flatten()
    entry = torch.zeros((2 * size[0] - 1) * (2 * size[1] - 1), dtype=torch.long)
    entry[offset] = torch.arange(offset.numel())
    return entry


def reached_table(
    bias: Tensor, entries: Tensor, sides: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """``[heads, 2k-1, 2k-1]``: what a kernel reaches of a relative table, its edge repeated where that is more.

    A step of the kernel is ``dilation`` steps of the table, which holds distances on the map.

    Args:
        bias: ``[heads, n, n]`` of a map or window of ``sides``.
        entries: positions in one head's flattened bias that hold the table, in key-minus-query order.
    """
    table = bias.flatten(1)[:, entries].unflatten(1, (2 * sides[0] - 1, 2 * sides[1] - 1))
    for axis, (side, reach, step) in enumerate(zip(sides, kernel, dilation, strict=True), start=1):
        offset = (step * torch.arange(1 - reach, reach, device=table.device)).clamp(1 - side, side - 1)
        table = table.index_select(axis, offset + side - 1)
    return table.contiguous()


def check_rules(rules: tuple[AxisRule, ...]) -> None:
    """Raise ``ArgumentError`` for an axis on which the rule has no meaning."""
    for axis, rule in enumerate(rules):
        for name in ("kernel_size", "stride", "dilation"):
            if getattr(rule, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(rule, name)} for axis {axis}")
        if rule.boundary not in BOUNDARIES:
            raise ArgumentError(f"boundary must be one of {', '.join(BOUNDARIES)}, got {rule.boundary!r}")
        if rule.is_causal and rule.boundary == MASK:
            raise ArgumentError(f"is_causal needs boundary {CLAMP!r} on axis {axis}: leave one of the two out")
        if not 0 <= rule.offset < rule.stride:
            raise ArgumentError(
                f"offset {rule.offset} lies outside 0 .. {rule.stride - 1} on axis {axis}: offsets repeat with the "
                f"stride, use {rule.offset % rule.stride}"
            )
        if rule.stride > rule.kernel_size:
            raise ArgumentError(
                f"stride {rule.stride} exceeds kernel_size {rule.kernel_size} on axis {axis}, so that some "
                f"keys would belong to no window: use a stride of at most {rule.kernel_size}"
            )
        if rule.boundary == CLAMP and rule.kernel_size * rule.dilation > rule.length:
            raise ArgumentError(_too_long(axis, rule))


def per_axis(value: Scalar | Sequence[Scalar], rank: int, name: str) -> tuple[Scalar, ...]:
    """Spread one value over the axes, or check that there is one value an axis."""
    if not isinstance(value, Sequence):
        return (value,) * rank
    if len(value) != rank:
        raise ArgumentError(f"{name} has {len(value)} entries for a {rank}-D map: give one, or one an axis")
    return tuple(value)


def _too_long(axis: int, rule: AxisRule) -> str:
    fitting = rule.length // rule.dilation
    remedy = (
        f"a kernel_size of at most {fitting}"
        if fitting
        else f"a dilation of at most {max(1, rule.length // rule.kernel_size)}"
    )
    return (
        f"kernel_size {rule.kernel_size} x dilation {rule.dilation} exceeds the {rule.length} tokens of axis "
        f"{axis}: use {remedy}"
    )
