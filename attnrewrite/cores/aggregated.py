"""Aggregated attention in the place of dense, windowed or spatially reduced attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sympy import Expr, Integer, Max, sqrt
from torch import Tensor, nn

from ..algebra.core_formula import CoreSizes, map_tokens, pairs_with_prefix
from ..algebra.site_formula import ZERO, K, N, P, SiteFormula, Widths, h
from ..algebra.symbols import down
from ..ir.core import AttentionCore, Operands
from ..ir.sites import Grid, Window
from ..modules.adaptive_pool import adaptive_average, cell_bounds
from ..operators.aggregated_attention import (
    AggregatedGeometry,
    AggregatedProblem,
    LearnedTokens,
    LocalKeys,
    SharedKeys,
    aggregated_attention,
)
from ..operators.index_rule import reached_table
from .exactness import ExactWhereHeld
from .sequence import attend, grid_of, join_map, split_map
from .window import require_same_border

Pair = tuple[int, int]


class LocalBranch(nn.Module):
    """What aggregated attention learns for a token's own window (Shi 2024, TransNeXt, section 3.1).

    Everything starts neutral: ``query_embedding`` ``[heads, 1, head_dim]``, ``learnable_tokens`` ``[heads, head_dim,
    window_size ** 2]`` and ``learnable_bias`` ``[heads, 1, window_size ** 2]`` at zero; ``relative_pos_bias_local``
    ``[heads, window_size ** 2]`` at ``bias``, or, where that is minus infinity, absent: then the window takes part
    after the softmax alone.
    """

    def __init__(self, heads: int, head_dim: int, window_size: int, bias: float) -> None:
        super().__init__()
        self.window_size = window_size
        places = window_size**2
        self.query_embedding = nn.Parameter(torch.zeros(heads, 1, head_dim))
        self.learnable_tokens = nn.Parameter(torch.zeros(heads, head_dim, places))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, places))
        self.relative_pos_bias_local = None
        if bias != float("-inf"):
            self.relative_pos_bias_local = nn.Parameter(torch.full((heads, places), bias))

    def keys(self, key: Tensor, value: Tensor, table: Tensor | None = None, seen: Tensor | None = None) -> LocalKeys:
        """The windows of a map; ``table`` ``[heads, window_size ** 2]`` is what the site adds to their scores."""
        own = self.relative_pos_bias_local
        if own is None:
            return LocalKeys(key, value, self.window_size, in_softmax=False)
        bias = own if table is None else own + table
        return LocalKeys(key, value, self.window_size, bias.to(key.dtype), seen)

    def problem(
        self, query: Tensor, scale: float, window: LocalKeys, shared: SharedKeys | None = None
    ) -> AggregatedProblem:
        """Of the ``[batch, height, width, heads, head_dim]`` queries of a map, whose windows ``keys`` gave."""
        embedded = query + self.query_embedding.transpose(0, 1).to(query.dtype)
        learned = LearnedTokens(query, self.learnable_tokens.to(query.dtype), self.learnable_bias.to(query.dtype))
        return AggregatedProblem(embedded * scale, window, shared, learned)

    def beside(self, shared: SiteFormula, queries: Expr, widths: Widths) -> SiteFormula:
        """The cost of the keys that all share, with the window around each of so many queries; scores that are left out
        of the softmax are not computed."""
        scored = self.relative_pos_bias_local is not None
        window = AggregatedGeometry(
            queries, 1, 1, widths.inner, widths.inner, window_size=sqrt(K), in_softmax=scored, learned=True
        )
        weights = h * queries * K if scored else ZERO
        return shared.plus({K: self.window_size**2}, core=window.macs(), attention_map=weights, saved=weights)

    def extra_repr(self) -> str:
        state = "after the softmax only" if self.relative_pos_bias_local is None else "in the softmax"
        return f"window_size={self.window_size}, {state}"


class AggregatedCore(ExactWhereHeld):
    """One softmax over a token's window, the pooled map and the prefix, for ``[prefix, map]`` sequences.

    A cell of the pooled map has the mean of its tokens' keys and values, which are the projections of their mean, and
    counts once for each of them (``log`` of their number is added to its scores). Prefix tokens see everything.

    Args:
        local: the window's parameters; None is no window.
        pool: rows and columns of tokens that a cell stands for.
        grid: the map and prefix at conversion.
        scale: multiplies the scores.
        window, entries: for a site with a bias: the size of its windows, or of the map, and where a flattened bias
            holds its relative table. The table serves the local window; cells have it where each is one token.
    """

    only_weighs_values = True
    counted_by_formula = True  # the window's scores are sums of shifted products, not contractions
    grid: Grid

    def __init__(
        self,
        local: LocalBranch | None,
        pool: Pair,
        grid: Grid,
        scale: float,
        window: Pair | None = None,
        entries: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.local, self.pool, self.grid, self.scale, self.window = local, pool, grid, scale, window
        self.register_buffer("entries", entries, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]``; ``bias`` ``[1, heads, n, n]`` by slots of a window."""
        grid = grid_of(query.shape[1], self.grid)
        prefix = grid.prefix_tokens
        (first, maps), (keys, key_map), (values, value_map) = (split_map(part, grid) for part in (query, key, value))
        cells = (max(1, grid.height // self.pool[0]), max(1, grid.width // self.pool[1]))
        self.hold(cells == (grid.height, grid.width) and (bias is None or cells == self.window), grid)
        pooled = [adaptive_average(part.flatten(3), cells) for part in (key_map, value_map)]
        shared = [
            torch.cat([own, cell.flatten(1, 2).unflatten(-1, own.shape[2:])], dim=1)
            for own, cell in zip((keys, values), pooled, strict=True)
        ]
        added = F.pad(_cell_counts(grid, cells, query).log(), (prefix, 0))
        if bias is not None and cells == self.window == (grid.height, grid.width):
            added = bias[0].unflatten(1, (grid.height, grid.width))
        keys_of_all = SharedKeys(shared[0], shared[1], added.to(query.dtype))
        if self.local is None:
            problem = AggregatedProblem(maps * self.scale, shared=keys_of_all)
        else:
            window = self.local.keys(key_map, value_map, self._table(bias))
            problem = self.local.problem(maps, self.scale, window, keys_of_all)
        image = aggregated_attention(problem)
        return join_map(attend(first, key, value, None, self.scale) if prefix else first, image)

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        """``2NPC`` for ``P`` cells, the pairs with the prefix, and the window. Keys and values are pooled, not what
        they are projected from."""
        if sizes.sides is None:
            return None
        rows, columns = (
            side if pool == 1 else Max(1, down(side, Integer(pool)))
            for side, pool in zip(sizes.sides, self.pool, strict=True)
        )
        pairs, values = pairs_with_prefix(P, self.grid.prefix_tokens)
        of_map = map_tokens(self.grid.prefix_tokens)
        shared = sizes.products("AA", pairs, values | {P: rows * columns})
        if self.pool != (1, 1):
            shared = shared.plus(normalization=2 * of_map * sizes.widths.inner)
        return shared if self.local is None else self.local.beside(shared, of_map, sizes.widths)

    def _table(self, bias: Tensor | None) -> Tensor | None:
        """``[heads, window_size ** 2]``: the part of the windows' bias that the local window reaches."""
        if bias is None or self.local is None or self.window is None:
            return None
        assert isinstance(self.entries, Tensor)
        reach = self.local.window_size // 2 + 1
        return reached_table(bias[0], self.entries, self.window, (reach, reach)).flatten(1)

    def extra_repr(self) -> str:
        return f"pool={self.pool}, grid={self.grid}, scale={self.scale:.4g}"


class ReducedAggregatedCore(AttentionCore):
    """One softmax over a token's window and the site's own reduced keys: PVT's reducer is kept.

    Args:
        local: the window's parameters.
        scale: multiplies the scores.
    """

    operands = Operands.OWN_MAP_TOO
    counted_by_formula = True  # as above

    def __init__(self, local: LocalBranch, scale: float) -> None:
        super().__init__()
        self.local, self.scale = local, scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, local_key: Tensor, local_value: Tensor) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]``; ``local_key`` and ``local_value`` ``[batch, height, width, heads,
        dim]`` of the query map."""
        query = query.unflatten(1, local_key.shape[1:3])
        window = self.local.keys(local_key, local_value)
        problem = self.local.problem(query, self.scale, window, SharedKeys(key, value))
        return aggregated_attention(problem).flatten(1, 2)

    def formula(self, sizes: CoreSizes) -> SiteFormula:
        """``2NPC`` for the reduced keys, and the window."""
        return self.local.beside(sizes.products("AA", N * P), N, sizes.widths)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}"


class MaskedAggregatedCore(AttentionCore):
    """Swin's windows as aggregated attention without a pooled map: a window of ``2 M - 1`` around every token holds the
    ``M x M`` block it is in, and a mask leaves the rest of it out of the softmax. The learned weights after the softmax
    see the whole window.

    Args:
        local: the window's parameters; they start at zero and add to the bias.
        blocks: the windows, shifted or not; none of their slots may be padding.
        grid: the map at conversion.
        scale: multiplies the scores.
        entries: where a flattened block's bias holds its relative table.
    """

    grid: Grid

    def __init__(self, local: LocalBranch, blocks: Window, grid: Grid, scale: float, entries: Tensor | None) -> None:
        super().__init__()
        self.local, self.blocks, self.grid, self.scale = local, blocks, grid, scale
        self.register_buffer("entries", entries, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[batch, height, width, heads, dim]`` maps; ``bias`` ``[heads, n, n]`` by slots of a block.

        Raises:
            ConversionError: the map has blocks that were not seen at conversion, or is no multiple of them.
        """
        grid = Grid(query.shape[1], query.shape[2])
        require_same_border(self.blocks, grid, self.grid, padded=False)
        table = None
        if bias is not None:
            assert isinstance(self.entries, Tensor)
            reach = self.local.window_size // 2 + 1
            table = reached_table(bias, self.entries, self.blocks.size, (reach, reach)).flatten(1)
        seen = same_block(self.blocks, grid, self.local.window_size).to(query.device)
        window = self.local.keys(key, value, table, seen.flatten(0, 1))
        return aggregated_attention(self.local.problem(query, self.scale, window))

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, grid={self.grid}, scale={self.scale:.4g}"


def same_block(blocks: Window, grid: Grid, window_size: int) -> Tensor:
    """``[height, width, window_size ** 2]``: which places of a token's window lie on the map and in its block."""
    slots = blocks.slots(grid)
    block, slot = torch.nonzero(slots >= 0, as_tuple=True)
    number = torch.empty(grid.tokens, dtype=torch.long)
    number[slots[block, slot]] = block
    number, reach = number.view(grid.height, grid.width), window_size // 2
    around = F.pad(number, (reach,) * 4, value=-1).unfold(0, window_size, 1).unfold(1, window_size, 1)
    return (around == number[:, :, None, None]).flatten(2)


def _cell_counts(grid: Grid, cells: Pair, like: Tensor) -> Tensor:
    """``[cells]``: how many tokens each cell of the pooled map stands for."""
    rows, columns = (
        end - start
        for start, end in (
            cell_bounds(side, count, like.device) for side, count in zip((grid.height, grid.width), cells, strict=True)
        )
    )
    return (rows[:, None] * columns).flatten().to(like.dtype)
