"""The operator ``attnrewrite::biased_attention``: dense attention with a bias that the positions on the map determine.

The bias of query and key is never an operand: it is ``log_decay`` times their Manhattan distance (RMT's Manhattan
attention; Fan et al. 2024, section 3), or the entry of a relative table (Liu et al. 2021), or both, and kernels make it
as they go, so that nothing of queries by keys need be in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..numerics.precision import accumulation_dtype
from .attention_problem import AttentionProblem, softmax_statistics
from .checks import check_shape
from .operator import Operator

MAP_AXES = 2


@dataclass(frozen=True)
class BiasedProblem(AttentionProblem):
    """One call, of token sequences.

    Attributes:
        query: ``[B, prefix_tokens + H * W, heads, head_dim]``: prefix tokens, then those of the map in raster order.
        key, value: ``[B, prefix_tokens + h * w, heads, head_dim or value_dim]`` of the keys' map.
        log_decay: ``[heads]``, natural logarithm of each head's decay a step, in float32 or float64.
        table: ``[heads, 2 H - 1, 2 W - 1]``, by key minus query; only where the keys' map is the queries'.
        sides: ``H`` and ``W``.
        key_sides: ``h`` and ``w``. The cells of a coarser map lie at their centers.
        prefix_tokens: tokens before the map's (class, register), whose logits have no bias.
        scale: of the dot products.
    """

    name = "biased_attention"
    keeps_precision = frozenset({"log_decay"})  # a distance of fifty steps multiplies its rounding
    log_decay: Tensor | None
    table: Tensor | None
    sides: tuple[int, ...]
    key_sides: tuple[int, ...]
    prefix_tokens: int
    scale: float

    def check(self) -> None:
        check_tokens("query", self.query, self.prefix_tokens + prod(self.sides))
        check_tokens("key", self.key, self.prefix_tokens + prod(self.key_sides))
        batch, heads, head_dim, _value_dim = self.sizes
        check_shape("key", self.key, (batch, self.key.shape[1], heads, head_dim))
        check_shape("value", self.value, (*self.key.shape[:-1], self.value.shape[-1]))
        self.check_alike()
        check_decay(self.log_decay, self.query)
        if self.table is not None and self.sides != self.key_sides:
            raise ArgumentError("table: has no entries for a coarser map of keys; use keys of the queries' map")
        check_shape("table", self.table, (heads, *(2 * side - 1 for side in self.sides)))

    def pairs(self) -> int:
        batch, heads, *_ = self.sizes
        return batch * heads * self.query.shape[1] * self.key.shape[1]

    def plain(self, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """All logits at once."""
        dtype = accumulation_dtype(self.query.dtype)
        query, key, value = (part.to(dtype).transpose(1, 2) for part in (self.query, self.key, self.value))
        logits = (query * self.scale) @ key.mT
        terms = self.terms_of_rows(0, self.sides[0], dtype)
        if terms is not None:
            logits = logits + terms
        weights, lse = softmax_statistics(logits, dropout)
        return (weights @ value).transpose(1, 2).to(self.query.dtype), lse.transpose(1, 2)

    def terms_of_rows(self, first: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """``[heads, queries, keys]``: what is added to the logits of some rows of queries; prefix tokens, to and from
        which there is no bias, go with the first row."""
        bias, prefix = self._bias_of_rows(first, stop, dtype), self.prefix_tokens
        return bias if bias is None or not prefix else F.pad(bias, (prefix, 0, prefix if first == 0 else 0, 0))

    def _bias_of_rows(self, first: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """``[heads, (stop - first) * W, h * w]``: the bias of some rows of queries with the whole map of keys."""
        terms = []
        if self.log_decay is not None:
            rows, columns = (
                axis_distance(side, keys, self.log_decay.dtype, self.log_decay.device)
                for side, keys in zip(self.sides, self.key_sides, strict=True)
            )
            distance = rows[first:stop, None, :, None] + columns[None, :, None, :]
            terms.append(self.log_decay[:, None, None] * distance.flatten(2).flatten(0, 1))
        if self.table is not None:
            terms.append(self.table.flatten(1)[:, self.entries_of_rows(first, stop, self.table.device)])
        return sum(term.to(dtype) for term in terms) if terms else None  # type: ignore[return-value]  # not 0: some terms

    def entries_of_rows(self, first: int, stop: int, device: torch.device) -> Tensor:
        """``[(stop - first) * W, H * W]``, int64: the flat entry of the table for some rows of queries."""
        height, width = self.sides
        place = [torch.arange(side, device=device) for side in (height, width)]
        down = place[0] - place[0][first:stop, None] + height - 1
        across = place[1] - place[1][:, None] + width - 1
        entry = down[:, None, :, None] * (2 * width - 1) + across[None, :, None, :]
        return entry.flatten(2).flatten(0, 1)


def axis_distance(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[queries, keys]``: steps along an axis between its places and the centers of its cells."""
    place = torch.arange(queries, device=device, dtype=dtype)
    center = (torch.arange(keys, device=device, dtype=dtype) + 0.5) * queries / keys - 0.5
    return (place[:, None] - center).abs()


def check_tokens(name: str, tensor: Tensor, tokens: int) -> None:
    """A sequence of so many tokens, heads last."""
    if tensor.dim() != MAP_AXES + 2 or tensor.shape[1] != tokens:
        raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}, expected [B, {tokens}, heads, channels]")
    if not tensor.is_floating_point():
        raise ArgumentError(f"{name} is {tensor.dtype}: attention needs a floating dtype, convert it first")


def check_decay(log_decay: Tensor | None, query: Tensor) -> None:
    """One decay a head, on the query's device and in enough precision."""
    check_shape("log_decay", log_decay, (query.shape[-2],))
    if log_decay is None:
        return
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"log_decay is {log_decay.dtype}: it is multiplied by distances, use float32 or float64")
    if log_decay.device != query.device:
        raise ArgumentError(f"log_decay is on {log_decay.device}, but query on {query.device}: move one of them")


BIASED_ATTENTION = Operator(BiasedProblem)
