"""Attention of every token to its neighborhood, and to the prefix tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra.core_formula import CoreSizes, pairs_with_prefix
from ..algebra.formulas import kernel_keys
from ..algebra.site_formula import K, N, P, SiteFormula
from ..errors import ConversionError
from ..functional import neighborhood_attention
from ..ir.sites import Grid
from ..operators.index_rule import axis_mask, reached_table, relative_entries
from .exactness import ExactWhereHeld

Pair = tuple[int, int]


class NeighborhoodAttention(ExactWhereHeld):
    """Neighborhood attention (Hassani et al. 2023; dilated: Hassani and Shi 2022) for ``[prefix, map]`` sequences.

    Map tokens see their neighborhood and all prefix tokens; prefix tokens see everything. Where the kernel covers the
    whole map this is dense attention. A kernel that does not fit a map (``kernel_size * dilation`` above its side) is
    clamped to the largest that does.

    Args:
        kernel_size, dilation: per axis.
        grid: the map and prefix at conversion; other sizes keep its aspect ratio unless they are given as a map.
        scale: multiplies the scores.
        dropout: rate on the attention weights, in training.
        entries: positions in a flattened dense bias ``[heads, tokens, tokens]`` that hold its relative table.
    """

    only_weighs_values = True
    grid: Grid

    def __init__(
        self,
        kernel_size: Pair,
        dilation: Pair,
        grid: Grid,
        scale: float,
        dropout: float = 0.0,
        entries: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.dilation, self.grid = kernel_size, dilation, grid
        self.scale, self.dropout = scale, dropout
        self.register_buffer("entries", entries, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]``; ``bias`` ``[1, heads, tokens, tokens]``."""
        grid = grid_of(query.shape[1], self.grid)
        kernel = clamped_kernel(self.kernel_size, self.dilation, grid)
        self.hold(covers(kernel, self.dilation, grid), grid)
        rate = self.dropout if self.training else 0.0
        if covers(kernel, self.dilation, grid):
            return self._attend(query, key, value, bias, rate)
        prefix = grid.prefix_tokens
        maps = [part[:, prefix:].unflatten(1, (grid.height, grid.width)) for part in (query, key, value)]
        extra_keys, extra_values = (key[:, :prefix], value[:, :prefix]) if prefix else (None, None)
        mixed = neighborhood_attention(
            maps[0], maps[1], maps[2], kernel, needed_dilation(kernel, self.dilation), scale=self.scale,
            bias=None if bias is None else self._table(bias, kernel, grid).to(query.dtype),
            additional_keys=extra_keys, additional_values=extra_values, dropout=rate,
        )  # fmt: skip
        assert isinstance(mixed, Tensor)
        if not prefix:
            return mixed.flatten(1, 2)
        return torch.cat([self._attend(query[:, :prefix], key, value, None, rate), mixed.flatten(1, 2)], dim=1)

    def _table(self, bias: Tensor, kernel: Pair, grid: Grid) -> Tensor:
        assert isinstance(self.entries, Tensor)
        sides = grid.height, grid.width
        entries = self.entries if grid == self.grid else relative_entries(sides).to(bias.device)
        return reached_table(bias[0], entries, sides, kernel, self.dilation)

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        """``2NKC`` for ``K`` keys in a kernel, and the pairs with the prefix."""
        if sizes.sides is None:
            return None
        pairs, values = pairs_with_prefix(K, self.grid.prefix_tokens)
        return sizes.products("NA", pairs, values | {K: kernel_keys(*sizes.sides, self.kernel_size, self.dilation)})

    def seen(self, queries: Tensor) -> Tensor:
        kernel = clamped_kernel(self.kernel_size, self.dilation, self.grid)
        return _seen_cells(queries, self.grid, self.grid, kernel, self.dilation)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scale).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, grid={self.grid}, scale={self.scale:.4g}"


class SlidingAttention(ExactWhereHeld):
    """Neighborhood attention on a map, with the bias that was learned inside windows.

    Args:
        kernel_size, dilation: per axis; a kernel that does not fit a map is clamped to the largest that does.
        window: size of the windows that the bias is given for.
        scale: multiplies the scores.
        entries: positions in a flattened window's bias that hold its relative table. Offsets that a window has not
            take the value of the nearest that it has; they were never trained.
        table_step: entries of the table that a step of the kernel is. None is the dilation: the table holds distances
            on the map.
    """

    def __init__(
        self,
        kernel_size: Pair,
        dilation: Pair,
        window: Pair,
        scale: float,
        entries: Tensor | None = None,
        table_step: Pair | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.dilation, self.window, self.scale = kernel_size, dilation, window, scale
        self.table_step = table_step or dilation
        self.register_buffer("entries", entries, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[batch, height, width, heads, dim]`` maps; ``bias`` ``[heads, n, n]`` by slots of a window.

        What windows hold in padded slots is not attended to: a neighborhood never leaves the map.
        """
        grid = Grid(query.shape[1], query.shape[2])
        kernel = clamped_kernel(self.kernel_size, self.dilation, grid)
        sides = (grid.height, grid.width)
        whole = kernel == self.window and all(
            k * d == side for k, d, side in zip(kernel, self.dilation, sides, strict=True)
        )
        self.hold(whole or (covers(kernel, self.dilation, grid) and self.window == sides), grid)
        table = None
        if bias is not None:
            assert isinstance(self.entries, Tensor)
            table = reached_table(bias, self.entries, self.window, kernel, self.table_step).to(query.dtype)
        mixed = neighborhood_attention(
            query, key, value, kernel, needed_dilation(kernel, self.dilation), scale=self.scale, bias=table
        )
        assert isinstance(mixed, Tensor)
        return mixed

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        """``2NKC`` for ``K`` keys in a kernel."""
        if sizes.sides is None:
            return None
        return sizes.products("NA", N * K, {K: kernel_keys(*sizes.sides, self.kernel_size, self.dilation)})

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, scale={self.scale:.4g}"


class ReducedNeighborhoodAttention(ExactWhereHeld):
    """Every query sees the ``kernel_size`` nearest cells of a reduced key map (PVT's spatial reduction kept).

    The cell above a query is ``floor(position * reduced side / side)``; windows slide inward at the border as in
    neighborhood attention. It runs as dense attention with a mask: the reduced map is small.

    Args:
        kernel_size: in cells of the reduced map, per axis; clamped to that map.
        grid, reduced: the query and the key map at conversion.
    """

    only_weighs_values = True
    grid: Grid

    def __init__(self, kernel_size: Pair, grid: Grid, reduced: Grid, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.kernel_size, self.grid, self.reduced = kernel_size, grid, reduced
        self.scale, self.dropout = scale, dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]`` queries and keys of their own maps."""
        grid, reduced = grid_of(query.shape[1], self.grid), grid_of(key.shape[1], self.reduced)
        mask = bias
        self.hold(covers(self.kernel_size, (1, 1), reduced), reduced)
        if any(k < side for k, side in zip(self.kernel_size, (reduced.height, reduced.width), strict=True)):
            seen = reduced_mask(self.kernel_size, grid, reduced).to(query.device)
            mask = seen if bias is None else bias.to(query.dtype).masked_fill(~seen, -math.inf)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        rate = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, rate, scale=self.scale).transpose(1, 2)

    def formula(self, sizes: CoreSizes) -> SiteFormula:
        """``2NPC``: every reduced key is scored, whichever are masked."""
        return sizes.products("reduced NA", N * P)

    def seen(self, queries: Tensor) -> Tensor:
        kernel = clamped_kernel(self.kernel_size, (1, 1), self.reduced)
        return _seen_cells(queries, self.grid, self.reduced, kernel, (1, 1))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, grid={self.grid}, reduced={self.reduced}, scale={self.scale:.4g}"


def grid_of(tokens: int, converted: Grid) -> Grid:
    """The map of a sequence: that of the image that the model was given. Where no image is known, the converted map, or
    one of its aspect ratio.

    Raises:
        ConversionError: the image has no map of so many tokens, or there is none of that aspect ratio.
    """
    count = tokens - converted.prefix_tokens
    image = converted.image
    maps = None if image is None else image.possible(count)
    if image is not None and maps is not None:
        if len(maps) != 1:
            sizes = " or ".join(f"{h}x{w}" for h, w in image.size.possible())
            raise ConversionError(
                f"a sequence of {tokens} tokens matches {'no map' if not maps else 'more than one map'} of the image, "
                f"{sizes}; convert the model with example inputs of this size, and without token dropping"
            )
        ((height, width),) = maps
        return Grid(height, width, converted.prefix_tokens)
    if tokens == converted.tokens:
        return converted
    height = round(math.sqrt(count * converted.height / converted.width)) if count > 0 else 0
    if height < 1 or count % height or height * converted.width != count // height * converted.height:
        raise ConversionError(
            f"a sequence of {tokens} tokens matches no map of the converted aspect ratio {converted}; convert the "
            "model "
            "with example inputs of this size"
        )
    return Grid(height, count // height, converted.prefix_tokens)


def clamped_kernel(kernel_size: Pair, dilation: Pair, grid: Grid) -> Pair:
    """The largest kernel up to ``kernel_size`` that the map holds at this dilation; at least the query itself."""
    sides = (grid.height, grid.width)
    height, width = (max(1, min(k, side // d)) for k, d, side in zip(kernel_size, dilation, sides, strict=True))
    return height, width


def needed_dilation(kernel_size: Pair, dilation: Pair) -> Pair:
    """A kernel of one has nothing to space; a dilation beyond the map would be refused."""
    rows, columns = (1 if k == 1 else d for k, d in zip(kernel_size, dilation, strict=True))
    return rows, columns


def covers(kernel_size: Pair, dilation: Pair, grid: Grid) -> bool:
    """Whether every query sees the whole map."""
    sides = (grid.height, grid.width)
    return all(k >= side and d == 1 for k, d, side in zip(kernel_size, dilation, sides, strict=True))


def reduced_mask(kernel_size: Pair, grid: Grid, reduced: Grid) -> Tensor:
    """``[queries, cells]``: which cells of the reduced map each query sees."""
    rows = axis_mask(grid.height, reduced.height, min(kernel_size[0], reduced.height), 1)
    columns = axis_mask(grid.width, reduced.width, min(kernel_size[1], reduced.width), 1)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(grid.height * grid.width, -1)


def _seen_cells(queries: Tensor, grid: Grid, keys: Grid, kernel: Pair, dilation: Pair) -> Tensor:
    """``[queries, tokens of keys]``: which keys each of some queries sees, prefix tokens included, where the two maps
    are the same or ``keys`` is a coarser one."""
    cell = (queries - grid.prefix_tokens).clamp(min=0)
    sides = ((grid.height, keys.height), (grid.width, keys.width))
    rows, columns = (
        axis_mask(side, length, min(k, length), d)[place]
        for (side, length), k, d, place in zip(
            sides, kernel, dilation, (cell // grid.width, cell % grid.width), strict=True
        )
    )
    seen = (rows[:, :, None] & columns[:, None, :]).flatten(1)
    seen = F.pad(seen, (keys.prefix_tokens, 0), value=True)
    return seen | (queries < grid.prefix_tokens)[:, None]
