"""Dense attention with a bias of positions, a few rows of queries at a time.

The bias of those rows is all there is of it in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...numerics.precision import accumulation_dtype
from ...operators import BiasedProblem
from ...operators.biased_attention import axis_distance
from .blocks import RUN_BYTES
from .tile_attention import Outcome, Tile, attention_by, derivative_by, fits_fused_kernel, outcome_of

Rows = tuple[int, int]


def forward(problem: BiasedProblem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see ``attnrewrite.operators.biased_attention``."""
    query, key, value = _heads_first(problem)
    output = problem.query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(*query.shape[:-1], 1)
    attention = attention_by(fused=_fits(problem))
    for rows in _rows(problem):
        part = _tokens(problem, rows)
        output[:, :, part], lse[:, :, part] = attention(
            Tile(query[:, :, part], key, value, _terms(problem, rows), problem.scale)
        )
    return output.transpose(1, 2), lse[..., 0].transpose(1, 2)


def backward(
    problem: BiasedProblem,
    results: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of its operands."""
    query, key, value = _heads_first(problem)
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    bias_gradients = _BiasGradients(problem, wanted)
    outcome = Outcome(*(each.transpose(1, 2).to(query.dtype) for each in outcome_of(results, gradients)))
    is_fused = _fits(problem) and gradients[1] is None and not bias_gradients.wanted
    differentiate = derivative_by(is_fused)
    for rows in _rows(problem):
        part = _tokens(problem, rows)
        tile = Tile(query[:, :, part], key, value, _terms(problem, rows), problem.scale)
        of_tile = differentiate(tile, Outcome(*(each[:, :, part] for each in outcome)))
        grad_query[:, :, part] = of_tile.query
        grad_key += of_tile.key
        grad_value += of_tile.value
        if of_tile.logits is not None:
            bias_gradients.add(rows, of_tile.logits)
    maps = (each.transpose(1, 2) for each in (grad_query, grad_key, grad_value))
    return (*maps, bias_gradients.log_decay, bias_gradients.table)


class _BiasGradients:
    """Gradients of decay and table, summed over rows of logits."""

    def __init__(self, problem: BiasedProblem, wanted: tuple[bool, ...]) -> None:
        self._problem = problem
        decay, table = (
            operand if wants else None for operand, wants in zip(problem.operands[3:], wanted[3:], strict=True)
        )
        self.log_decay = None if decay is None else torch.zeros_like(decay)
        # Row by row in memory, whatever the table's layout: entries are added through a flat view.
        self.table = None if table is None else table.new_zeros(table.shape, dtype=accumulation_dtype(table.dtype))
        self.wanted = decay is not None or table is not None

    def add(self, rows: Rows, logits: Tensor) -> None:
        """Of the gradients of some rows' logits, ``[B, heads, points, keys]``."""
        prefix, (first, stop) = self._problem.prefix_tokens, rows
        on_map = logits[:, :, prefix if first == 0 else 0 :, prefix:].sum(0)
        if self.log_decay is not None:
            distance = [
                axis_distance(side, keys, self.log_decay.dtype, logits.device)
                for side, keys in zip(self._problem.sides, self._problem.key_sides, strict=True)
            ]
            steps = distance[0][first:stop, None, :, None] + distance[1][None, :, None, :]
            self.log_decay += (on_map * steps.flatten(2).flatten(0, 1)).sum((1, 2))
        if self.table is not None:
            entries = self._problem.entries_of_rows(first, stop, logits.device)
            self.table.flatten(1).index_add_(1, entries.flatten(), on_map.flatten(1).to(self.table.dtype))


def _rows(problem: BiasedProblem) -> Iterator[Rows]:
    """Rows of queries whose logits stay in cache together, one at least; none but prefix tokens on an empty map."""
    if not problem.query.shape[1]:
        return
    height, width = problem.sides
    batch, heads, *_ = problem.sizes
    run = RUN_BYTES.get(problem.query.device.type, RUN_BYTES["cuda"])
    count = max(1, run // max(1, 4 * batch * heads * width * problem.key.shape[1]))
    for first in range(0, max(height, 1), count):
        yield first, min(first + count, height)


def _tokens(problem: BiasedProblem, rows: Rows) -> slice:
    """The queries of some rows; prefix tokens go with the first."""
    prefix, width = problem.prefix_tokens, problem.sides[1]
    return slice(0 if rows[0] == 0 else prefix + rows[0] * width, prefix + rows[1] * width)


def _terms(problem: BiasedProblem, rows: Rows) -> Tensor | None:
    return problem.terms_of_rows(*rows, accumulation_dtype(problem.query.dtype))


def _heads_first(problem: BiasedProblem) -> list[Tensor]:
    dtype = accumulation_dtype(problem.query.dtype)
    return [part.to(dtype).transpose(1, 2) for part in (problem.query, problem.key, problem.value)]


def _fits(problem: BiasedProblem) -> bool:
    """Whether the fused kernel takes it: not where the table might leave a query without a key."""
    table = problem.table
    return fits_fused_kernel(problem.query, problem.value) and (table is None or not table.isneginf().any())
