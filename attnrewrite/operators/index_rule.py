"""Which keys a query of neighborhood attention sees, axis by axis, and which entry of a relative table it adds.

The rule is NATTEN's (Hassani et al. 2023, Neighborhood Attention Transformer; Hassani and Shi 2022, dilation; Hassani
et al. 2025, Generalized Neighborhood Attention, stride). Axes are independent: a query's neighborhood on a map is the
Cartesian product of its windows on the axes. Unlike NATTEN a kernel size of 1 is legal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentError

Scalar = TypeVar("Scalar", int, bool)


class Neighborhood(NamedTuple):
    """The rule of a map: every field has one entry an axis, of the meaning it has in ``AxisRule``.

    A tuple, so that it spreads into the flat arguments that operators of ``torch.library`` take.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]


@dataclass(frozen=True)
class AxisRule:
    """The neighborhood along ``length`` tokens: keys ``dilation`` apart, ``stride`` queries a window."""

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def window(self, query: int) -> range:
        """Keys of one query, ascending: ``kernel_size`` of them, as windows slide inward; fewer if causal."""
        group, position = query % self.dilation, query // self.dilation
        group_length = -(-(self.length - group) // self.dilation)
        shared = position // self.stride * self.stride
        if self.is_causal:
            leader = min(shared + self.stride - 1, group_length - 1)
            first, stop = max(leader - self.kernel_size + 1, 0), position + 1
        else:
            leader = min(shared + self.stride // 2, group_length - 1)
            first = min(max(leader - self.kernel_size // 2, 0), group_length - self.kernel_size)
            stop = first + self.kernel_size
        return range(first * self.dilation + group, stop * self.dilation + group, self.dilation)


@dataclass(frozen=True)
class AxisTable:
    """An ``AxisRule`` as int64 (and bool) tensors of shape ``[length, kernel_size]``.

    Causal windows shrink; their unused slots have ``valid`` False and repeat the last key, so every index is legal.
    ``bias_index`` is the entry of the relative position bias: (key - query) / dilation + kernel_size - 1.
    """

    keys: Tensor
    valid: Tensor
    bias_index: Tensor


@lru_cache(maxsize=256)
def windows(rule: AxisRule) -> tuple[range, ...]:
    """The window of every query of an axis."""
    return tuple(rule.window(query) for query in range(rule.length))


@lru_cache(maxsize=256)
def axis_table(rule: AxisRule, device: torch.device) -> AxisTable:
    """The windows of an axis as index tensors on ``device``."""
    bounds = torch.tensor([(window[0], window[-1]) for window in windows(rule)], device=device)
    first, last = bounds[:, :1], bounds[:, 1:]
    reach = first + torch.arange(rule.kernel_size, device=device) * rule.dilation
    keys = torch.minimum(reach, last)
    steps = (keys - torch.arange(rule.length, device=device)[:, None]) // rule.dilation
    return AxisTable(keys=keys, valid=reach <= last, bias_index=steps + rule.kernel_size - 1)


def axis_rules(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> tuple[AxisRule, ...]:
    """One rule an axis; the tuples have one entry an axis, already checked by ``check_rules``."""
    return tuple(map(AxisRule, grid, kernel_size, stride, dilation, is_causal))


def attended_pairs(rule: AxisRule) -> int:
    """Number of (query, key) pairs along an axis; on a map the counts of its axes multiply."""
    if not rule.is_causal:
        return rule.length * rule.kernel_size
    return sum(map(len, windows(rule)))


def axis_mask(queries: int, keys: int, kernel_size: int, dilation: int) -> Tensor:
    """``[queries, keys]``, bool: the neighborhood rule along one axis; that of ``keys`` may be coarser."""
    rule = AxisRule(keys, kernel_size, dilation=dilation)
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for query in range(queries):
        seen[query, list(rule.window(query * keys // queries))] = True
    return seen


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
        if rule.stride > rule.kernel_size:
            raise ArgumentError(
                f"stride {rule.stride} exceeds kernel_size {rule.kernel_size} on axis {axis}, so that some "
                f"keys would belong to no window: use a stride of at most {rule.kernel_size}"
            )
        if rule.kernel_size * rule.dilation > rule.length:
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
