"""What the attention operators have in common: maps of queries, keys and values, and their statistics.

Shapes are heads last: query ``[B, *grid, heads, head_dim]``, value ``[..., heads, value_dim]``. The results are the
output ``[B, *grid, heads, value_dim]`` and the log-sum-exp of all logits of a query, ``[B, *grid, heads]`` (natural
logarithm, float32 for half precision). Gradients flow through both.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..numerics.precision import accumulation_dtype
from .checks import check_both, check_shape
from .problem import Problem

MAX_RANK = 3


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """Attention of the queries of a map. Subclasses have operands ``query``, ``key`` and ``value``."""

    results: ClassVar[tuple[str, ...]] = ("output", "lse")
    query: Tensor
    key: Tensor
    value: Tensor

    @abstractmethod
    def pairs(self) -> int:
        """Number of (query, key) pairs of all images and heads: exactly the keys that each query sees."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Sides of the queries' map, in tokens."""
        return tuple(self.query.shape[1:-2])

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Images, heads, channels of a head's queries and keys, and of its values."""
        *_, heads, head_dim = self.query.shape
        return self.query.shape[0], heads, head_dim, self.value.shape[-1]

    @abstractmethod
    def plain(self, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """As ``Problem.plain``, with a rate of dropout on the weights of the softmax."""

    def empty_results(self) -> tuple[Tensor, Tensor]:
        query = self.query
        output = query.new_empty(*query.shape[:-1], self.value.shape[-1])
        return output, query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))

    def macs(self) -> int:
        """Two products over the pairs: scores, and the average of values."""
        return self.pairs() * (self.query.shape[-1] + self.value.shape[-1])

    def elementwise(self) -> int:
        """The softmax: maximum, difference, exponential, sum and quotient of every pair."""
        return 5 * self.pairs()

    def backward_macs(self) -> int:
        """Five products: the scores again, and the gradients of weights, query, key and value."""
        return self.pairs() * (3 * self.query.shape[-1] + 2 * self.value.shape[-1])

    def check_maps(self) -> int:
        """Query, key and value are maps of one grid; all operands share dtype and device. Returns the map's rank."""
        query, key, value = self.query, self.key, self.value
        rank = map_rank(query)
        if not query.is_floating_point():
            raise ArgumentError(f"query is {query.dtype}: attention needs a floating dtype, convert it first")
        check_shape("key", key, tuple(query.shape))
        check_shape("value", value, (*query.shape[:-1], value.shape[-1]))
        self.check_alike()
        return rank


def map_rank(query: Tensor) -> int:
    """Number of axes of the map ``[B, *grid, heads, head_dim]``."""
    rank = query.dim() - 3
    if not 1 <= rank <= MAX_RANK:
        raise ArgumentError(
            f"query has {query.dim()} dimensions, expected [B, *grid, heads, head_dim], 1 to {MAX_RANK} axes"
        )
    return rank


def softmax_statistics(logits: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Weights ``[..., keys]``, some of them dropped, and log-sum-exp ``[...]``."""
    weights = logits.softmax(-1)
    return (F.dropout(weights, dropout) if dropout else weights), logits.logsumexp(-1)


def check_additional(key: Tensor | None, value: Tensor | None, sizes: tuple[int, int, int, int]) -> None:
    """Extra keys and values come together, with the batch, heads and channels (``sizes``) of key and value."""
    check_both("additional_keys", key, "additional_values", value)
    if key is None or value is None:
        return
    batch, heads, head_dim, value_dim = sizes
    additional = key.shape[1] if key.dim() == 4 else 1
    check_shape("additional_keys", key, (batch, additional, heads, head_dim))
    check_shape("additional_values", value, (batch, additional, heads, value_dim))


def default_scale(scale: float | None, head_dim: int) -> float:
    """``head_dim ** -0.5`` where none is given; products of no channels are 0 at any scale."""
    return max(head_dim, 1) ** -0.5 if scale is None else scale
