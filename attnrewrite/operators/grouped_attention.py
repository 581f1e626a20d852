"""The operator ``attnrewrite::grouped_attention``: attention inside the groups of a partition of a map.

Groups are windows (Liu et al. 2021, Swin Transformer; shifted ones without their cyclic roll) or interleaved (Wang et
al. 2022, CrossFormer's long distance attention; Tu et al. 2022, MaxViT's grid attention); ``partition_rule`` has the
rule. Slots beyond the map are absent, or keys of their own (Swin does not mask its padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..numerics.precision import accumulation_dtype
from .attention_problem import AttentionProblem, check_additional, softmax_statistics
from .checks import check_both, check_shape
from .operator import Operator
from .partition_rule import (
    ABSENT,
    PADDING,
    AxisPartition,
    attended_slots,
    axis_slots,
    check_partitions,
    slots_of_tokens,
)


@dataclass(frozen=True)
class GroupedProblem(AttentionProblem):
    """One call; geometry has one entry an axis of the map.

    Attributes:
        query, key: ``[B, *grid, heads, head_dim]``.
        value: ``[B, *grid, heads, value_dim]``.
        bias: ``[heads, n, n]`` over the n slots of a full group (row-major; rows are queries, columns keys), of which
            truncated groups use their part.
        pad_key, pad_value: ``[heads, head_dim]`` and ``[heads, value_dim]``: the map counts as padded at the end of
            each axis to whole regions, and every padded slot is this key and value. Without them no slot beyond the
            map is attended to.
        additional_keys, additional_values: ``[B, additional, heads, head_dim or value_dim]``, seen by every query,
            without bias.
        window_size: slots of a group.
        shift: tokens before the first full region.
        interval: from a token of a group to the next one; 1 gives windows.
        rolled: whether the map is rolled by ``shift`` before it is padded, so that the tokens that are rolled over join
            the last real ones; it matters where the map is no multiple of the window.
        scale: of the dot products.
    """

    name = "grouped_attention"
    bias: Tensor | None
    pad_key: Tensor | None
    pad_value: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None
    window_size: tuple[int, ...]
    shift: tuple[int, ...]
    interval: tuple[int, ...]
    rolled: bool
    scale: float

    @property
    def partitions(self) -> tuple[AxisPartition, ...]:
        """The partition of each axis."""
        axes = zip(self.grid, self.window_size, self.shift, self.interval, strict=True)
        padded, rolled = self.pad_key is not None, self.rolled
        return tuple(AxisPartition(length, size, shift, padded, step, rolled) for length, size, shift, step in axes)

    @property
    def slots(self) -> int:
        """Slots of a full group."""
        return prod(self.window_size)

    @property
    def additional(self) -> int:
        """Number of keys beside those of the map and its padding."""
        return 0 if self.additional_keys is None else self.additional_keys.shape[1]

    def check(self) -> None:
        self.check_maps()
        check_partitions(self.partitions)
        if self.rolled and max(self.interval) > 1:
            raise ArgumentError(f"rolled: only windows are rolled, got interval {self.interval}; leave one of them out")
        _batch, heads, head_dim, value_dim = self.sizes
        check_shape("bias", self.bias, (heads, self.slots, self.slots))
        check_both("pad_key", self.pad_key, "pad_value", self.pad_value)
        check_shape("pad_key", self.pad_key, (heads, head_dim))
        check_shape("pad_value", self.pad_value, (heads, value_dim))
        check_additional(self.additional_keys, self.additional_values, self.sizes)

    def pairs(self) -> int:
        """Truncated groups count with the slots they have; padding counts as keys, which it is, but not as queries,
        whose results would be thrown away."""
        batch, heads, *_ = self.sizes
        return batch * heads * (prod(map(attended_slots, self.partitions)) + prod(self.grid) * self.additional)

    def plain(self, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Every group gathered once, and dense attention inside."""
        groups = _Groups(self)
        query = groups.gathered(self.query * self.scale, None)
        key, value = groups.gathered(self.key, self.pad_key), groups.gathered(self.value, self.pad_value)
        logits = torch.einsum("bgqhd,bgkhd->bghqk", query, key)
        if self.bias is not None:
            logits = logits + groups.widened(self.bias)
        logits = logits.masked_fill(groups.absent[:, None, None, :], -torch.inf)
        if self.additional_keys is not None:
            additional = torch.einsum("bgqhd,bkhd->bghqk", query, groups.widened(self.additional_keys))
            logits = torch.cat([logits, additional], dim=-1)
        weights, lse = softmax_statistics(logits, dropout)
        mixed = torch.einsum("bghqk,bgkhd->bgqhd", weights[..., : self.slots], value)
        if self.additional_values is not None:
            additional_values = groups.widened(self.additional_values)
            mixed = mixed + torch.einsum("bghqk,bkhd->bgqhd", weights[..., self.slots :], additional_values)
        output = groups.scattered(mixed).to(self.query.dtype)
        return output, groups.scattered(lse.transpose(2, 3)[..., None]).squeeze(-1)


class _Groups:
    """The groups of a map, gathered axis by axis."""

    def __init__(self, problem: GroupedProblem) -> None:
        device = problem.query.device
        self._dtype = accumulation_dtype(problem.query.dtype)
        self._slots = [axis_slots(partition).to(device) for partition in problem.partitions]
        self._places = [slots_of_tokens(slots, side) for slots, side in zip(self._slots, problem.grid, strict=True)]
        self._sizes = problem.window_size
        absent, padding = self._anywhere(ABSENT), self._anywhere(PADDING)
        self.absent, self._padding = absent, padding & ~absent

    def widened(self, operand: Tensor) -> Tensor:
        return operand.to(self._dtype)

    def gathered(self, source: Tensor, pad: Tensor | None) -> Tensor:
        """``[B, groups, slots, heads, dim]`` of a map; padded slots hold ``pad``, absent ones zero."""
        source = self.widened(source)
        for axis, slots in enumerate(self._slots, start=1):
            source = source.index_select(axis, slots.flatten().clamp(min=0))
        source = self._grouped(source)
        # a weight of zero does not hide what is not finite
        source = source.masked_fill(self.absent[..., None, None], 0)
        return source if pad is None else torch.where(self._padding[..., None, None], self.widened(pad), source)

    def scattered(self, groups: Tensor) -> Tensor:
        """The inverse: ``[B, *grid, heads, dim]``."""
        rank = len(self._sizes)
        counts = [slots.shape[0] for slots in self._slots]
        groups = groups.unflatten(2, self._sizes).unflatten(1, counts)
        order = (each for axis in range(1, rank + 1) for each in (axis, axis + rank))
        groups = groups.permute(0, *order, 2 * rank + 1, 2 * rank + 2)
        for axis, places in enumerate(self._places, start=1):
            groups = groups.flatten(axis, axis + 1).index_select(axis, places)
        return groups

    def _grouped(self, source: Tensor) -> Tensor:
        """``[B, *(groups * slots), ...]`` axis by axis to ``[B, groups, slots, ...]``."""
        rank = len(self._sizes)
        for axis in range(rank, 0, -1):
            source = source.unflatten(axis, self._slots[axis - 1].shape)
        order = (*range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))
        return (
            source.permute(0, *order, *range(2 * rank + 1, source.dim())).flatten(rank + 1, 2 * rank).flatten(1, rank)
        )

    def _anywhere(self, kind: int) -> Tensor:
        """``[groups, slots]``, bool: which slots are of a kind on some axis."""
        found = torch.zeros(
            (1, *(slots.numel() for slots in self._slots)), dtype=torch.bool, device=self._slots[0].device
        )
        for axis, slots in enumerate(self._slots, start=1):
            shape = [1] * found.dim()
            shape[axis] = -1
            found = found | (slots.flatten() == kind).view(shape)
        return self._grouped(found)[0]


GROUPED_ATTENTION = Operator(GroupedProblem)
