"""Manhattan self-attention in the place of dense attention."""

from __future__ import annotations

import torch
from sympy import Expr, Symbol
from torch import Tensor, nn

from ..algebra.core_formula import CoreSizes, map_tokens
from ..algebra.site_formula import COLUMNS, PREFIX, ROWS, ZERO, Extent, K, N, P, SiteFormula
from ..ir.core import AttentionCore
from ..ir.sites import Grid
from ..modules.depthwise import DepthwiseConv
from ..operators.manhattan_attention import ManhattanGeometry, manhattan_attention
from .sequence import attend, grid_of, join_map, split_map


class ManhattanCore(AttentionCore):
    """Attention decayed by Manhattan distance, with local context enhancement (Fan et al. 2024), of ``[prefix, map]``.

    The decay acts between tokens of the map; prefix tokens see and are seen without decay. The enhancement starts at
    zero.

    Args:
        log_decay: natural logarithm of each head's decay a step; zero is no decay.
        grid: the map and prefix at conversion.
        channels: of all heads' values together.
        scale: multiplies the scores.
        dropout: rate on the attention weights, in training.
        placement: of the decay, ``"inside"`` or ``"outside"`` the softmax.
        lce: whether there is a local context enhancement.
    """

    grid: Grid

    def __init__(
        self,
        log_decay: tuple[float, ...],
        grid: Grid,
        channels: int,
        scale: float,
        dropout: float = 0.0,
        placement: str = "inside",
        lce: bool = True,
    ) -> None:
        super().__init__()
        self.log_decay, self.grid, self.scale = log_decay, grid, scale
        self.dropout, self.placement = dropout, placement
        self.lepe = neutral_enhancement(channels) if lce else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]``; ``bias`` ``[1, heads, tokens, tokens]`` adds to the scores."""
        grid = grid_of(query.shape[1], self.grid)
        log_decay = decay_of(self.log_decay, query)
        geometry = ManhattanGeometry(
            grid.height, grid.width, grid.prefix_tokens, placement=self.placement, scale=self.scale,
            dropout=self.dropout if self.training and self.placement == "inside" else 0.0,
        )  # fmt: skip
        mixed = manhattan_attention(query, key, value, log_decay, geometry, bias)
        return enhanced(mixed, value, grid, self.lepe)

    def formula(self, sizes: CoreSizes) -> SiteFormula:
        """``2N²C``, and the enhancement."""
        dense, values = _enhancement_cost(self.lepe, self.grid, sizes)
        return sizes.products("MaSA", N * P, values, dense)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, placement={self.placement!r}, scale={self.scale:.4g}"


class DecomposedManhattanCore(AttentionCore):
    """The decomposed form: along rows, then along columns, with the same queries and keys. Tokens of the map see the
    map alone; prefix tokens see everything.

    ``gate`` blends it with the dense attention that it replaces, ``(1 - gate) * dense + gate * decomposed``; it starts
    at ``opening`` and trains. None leaves the dense attention out.

    Args: as for ``ManhattanCore``.
    """

    grid: Grid

    def __init__(
        self,
        log_decay: tuple[float, ...],
        grid: Grid,
        channels: int,
        scale: float,
        opening: float | None,
        lce: bool = True,
    ) -> None:
        super().__init__()
        self.log_decay, self.grid, self.scale = log_decay, grid, scale
        self.gate = None if opening is None else nn.Parameter(torch.full((len(log_decay), 1), opening))
        self.lepe = neutral_enhancement(channels) if lce else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]``."""
        grid = grid_of(query.shape[1], self.grid)
        log_decay = decay_of(self.log_decay, query)
        parts = [split_map(part, grid)[1] for part in (query, key, value)]
        geometry = ManhattanGeometry(grid.height, grid.width, decomposed=True, scale=self.scale)
        image = manhattan_attention(parts[0], parts[1], parts[2], log_decay, geometry)
        if self.gate is None:
            mixed = join_map(attend(query[:, : grid.prefix_tokens], key, value, None, self.scale), image)
        else:
            dense = attend(query, key, value, None, self.scale)
            prefix, old = split_map(dense, grid)
            mixed = join_map(prefix, old + self.gate.to(old.dtype) * (image - old))
        return enhanced(mixed, value, grid, self.lepe)

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        """``2N(H + W)C`` along rows and columns, with both passes' maps; beside a gate the dense attention too."""
        if sizes.sides is None:
            return None
        dense, values = _enhancement_cost(self.lepe, self.grid, sizes)
        prefix = self.grid.prefix_tokens
        whole = N**2 if self.gate is not None else (PREFIX * N if prefix else ZERO)
        pairs = map_tokens(prefix) * (ROWS + COLUMNS) + whole
        values |= {ROWS: sizes.sides[0], COLUMNS: sizes.sides[1], **({PREFIX: prefix} if prefix else {})}
        return sizes.products("MaSA-d", pairs, values, dense)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, scale={self.scale:.4g}"


class ReducedManhattanCore(AttentionCore):
    """Manhattan decay towards the centers of a reduced key map's cells: PVT's spatial reduction and its cost are kept.

    Args:
        log_decay: of each head, a step of the query map.
        grid, reduced: the query and the key map at conversion.
    """

    only_weighs_values = True
    grid: Grid

    def __init__(
        self, log_decay: tuple[float, ...], grid: Grid, reduced: Grid, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.log_decay, self.scale, self.dropout = log_decay, scale, dropout
        self.grid, self.reduced = grid, reduced

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Heads-last ``[batch, tokens, heads, dim]`` queries and keys of their own maps."""
        grid, reduced = grid_of(query.shape[1], self.grid), grid_of(key.shape[1], self.reduced)
        log_decay = decay_of(self.log_decay, query)
        geometry = ManhattanGeometry(
            grid.height, grid.width, keys=(reduced.height, reduced.width), scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return manhattan_attention(query, key, value, log_decay, geometry)

    def formula(self, sizes: CoreSizes) -> SiteFormula:
        """``2NPC``: every reduced key is scored, however decayed."""
        return sizes.products("reduced MaSA", N * P)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, reduced={self.reduced}, scale={self.scale:.4g}"


def decay_of(log_decay: tuple[float, ...], like: Tensor) -> Tensor:
    """``[heads]`` in float64 for float64 values, else in float32: kept as numbers, no cast of a model spoils them."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(log_decay, dtype=dtype, device=like.device)


def neutral_enhancement(channels: int) -> DepthwiseConv:
    """Local context enhancement that adds nothing yet."""
    lepe = DepthwiseConv(channels, 5)
    for parameter in lepe.parameters():
        nn.init.zeros_(parameter)
    return lepe


def _enhancement_cost(
    lepe: DepthwiseConv | None, grid: Grid, sizes: CoreSizes
) -> tuple[Expr, dict[Symbol, Extent]]:
    """MACs of the convolution of the map's values, and what the symbols in them are."""
    if lepe is None:
        return ZERO, {}
    prefix, taps = grid.prefix_tokens, lepe.conv.kernel_size
    values = {K: taps[0] * taps[1], **({PREFIX: prefix} if prefix else {})}
    return K * map_tokens(prefix) * sizes.widths.inner, values


def enhanced(mixed: Tensor, value: Tensor, grid: Grid, lepe: nn.Module | None) -> Tensor:
    """The map's tokens plus the convolution of their values; prefix tokens as they are."""
    if lepe is None:
        return mixed
    prefix, image = split_map(mixed, grid)
    local = lepe(split_map(value, grid)[1].flatten(-2)).unflatten(-1, image.shape[-2:])
    return join_map(prefix, image + local)


__all__ = ["DecomposedManhattanCore", "ManhattanCore", "ReducedManhattanCore"]
