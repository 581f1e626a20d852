"""The operator ``attnrewrite::axial_attention``: every token of a map attends to its row, or to its column.

``log_decay`` times the distance along the axis may add to the logits. Two calls, along rows and then along columns with
the same queries and keys, are decomposed Manhattan attention (Fan et al. 2024, RMT, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import ArgumentError
from .attention_problem import AttentionProblem
from .biased_attention import MAP_AXES, BiasedProblem, check_decay
from .operator import Operator

ALONG_COLUMNS, ALONG_ROWS = 0, 1


@dataclass(frozen=True)
class AxialProblem(AttentionProblem):
    """One call.

    Attributes:
        query, key: ``[B, H, W, heads, head_dim]``.
        value: ``[B, H, W, heads, value_dim]``.
        log_decay: ``[heads]``, natural logarithm of each head's decay a step, in float32 or float64.
        axis: ``ALONG_ROWS`` (tokens of one row see each other) or ``ALONG_COLUMNS``.
        scale: of the dot products.
    """

    name = "axial_attention"
    keeps_precision = frozenset({"log_decay"})
    log_decay: Tensor | None
    axis: int
    scale: float

    def check(self) -> None:
        if self.check_maps() != MAP_AXES:
            raise ArgumentError(f"query has {self.query.dim()} dimensions, expected [B, H, W, heads, head_dim]")
        if self.axis not in (ALONG_COLUMNS, ALONG_ROWS):
            known = f"{ALONG_COLUMNS} (along columns) or {ALONG_ROWS} (along rows)"
            raise ArgumentError(f"axis must be {known}, got {self.axis}")
        check_decay(self.log_decay, self.query)

    def pairs(self) -> int:
        batch, heads, *_ = self.sizes
        height, width = self.grid
        return batch * heads * height * width * self.grid[self.axis]

    def plain(self, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        output, lse = self.as_lines().plain(dropout)
        return self.from_lines(output), self.from_lines(lse)

    def as_lines(self) -> BiasedProblem:
        """Dense attention of the lines of all images, ``[B * lines, length, heads, ...]``, as maps of one row."""
        query, key, value = (self.lines(part) for part in (self.query, self.key, self.value))
        sides = (1, self.grid[self.axis])
        return BiasedProblem(query, key, value, self.log_decay, None, sides, sides, 0, self.scale)

    def lines(self, source: Tensor) -> Tensor:
        """``[B, H, W, ...]`` to ``[B * lines, length, ...]``."""
        return (source if self.axis == ALONG_ROWS else source.transpose(1, 2)).flatten(0, 1)

    def from_lines(self, lines: Tensor) -> Tensor:
        """The inverse of ``lines``."""
        along = lines.unflatten(0, (self.sizes[0], self.grid[1 - self.axis]))
        return along if self.axis == ALONG_ROWS else along.transpose(1, 2)


AXIAL_ATTENTION = Operator(AxialProblem)
