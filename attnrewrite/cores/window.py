"""Attention inside the blocks of a partition of the map."""

from __future__ import annotations

from torch import Tensor

from ..algebra.core_formula import CoreSizes
from ..algebra.formulas import window_pairs
from ..algebra.site_formula import PAIRS, SiteFormula
from ..errors import ConversionError
from ..functional import grouped_attention
from ..ir.core import AttentionCore
from ..ir.sites import Grid, Window


class WindowAttention(AttentionCore):
    """Swin's (shifted) window attention (Liu et al. 2021) without roll and mask: blocks are cut where they lie.

    It is neighborhood attention with a stride equal to the kernel size, with an offset and truncated border blocks.

    Args:
        window: block size, shift, and what stands beyond the border.
        grid: the map at conversion. What a border would hold on a map that needs padding is only known if the window
            is ``padding_keys``, or on this map.
        scale: multiplies the scores.
        dropout: rate on the attention weights, in training.
    """

    keeps_weights = True
    counted_by_formula = True  # kernels and plain forms take blocks of one size, also where the border cuts them
    grid: Grid

    def __init__(self, window: Window, grid: Grid, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.window, self.grid, self.scale, self.dropout = window, grid, scale, dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        pad_key: Tensor | None = None,
        pad_value: Tensor | None = None,
    ) -> Tensor:
        """``[batch, height, width, heads, dim]`` maps; ``bias`` ``[heads, n, n]`` by slots of a block; ``pad_key`` and
        ``pad_value`` ``[heads, dim]`` stand in padded slots. Returns the map of mixed values."""
        grid = Grid(query.shape[1], query.shape[2])
        require_same_border(self.window, grid, self.grid, self.window.padding_keys)
        shift = tuple(self.window.partition(side, axis).shift for axis, side in enumerate((grid.height, grid.width)))
        mixed = grouped_attention(
            query, key, value, self.window.size, shift, self.scale, None if bias is None else bias.to(query.dtype),
            pad_key, pad_value, rolled=self.window.rolled_first, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        assert isinstance(mixed, Tensor)
        return mixed

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        """``2QC`` for ``Q`` pairs of a token and a slot of its block, truncated at the border."""
        if sizes.sides is None:
            return None
        return sizes.products("block NA", PAIRS, {PAIRS: window_pairs(*sizes.sides, self.window)})

    @property
    def padded(self) -> Window | None:
        return self.window if self.window.padding_keys else None

    def extra_repr(self) -> str:
        return f"{self.window}, scale={self.scale:.4g}, dropout={self.dropout}"


def require_same_border(window: Window, grid: Grid, converted: Grid, padded: bool) -> None:
    """Stop at a map on which what the original does at the border was not seen, when it was ``converted``.

    ``padded``: what stands in padded slots is known.

    Raises:
        ConversionError: it was not seen.
    """
    seen = converted.seen
    if not window.divides(grid) and not padded and all(window.divides(other) for other in seen):
        raise ConversionError(
            f"a {grid} map is no multiple of the window {window.size}, and how the original would pad it "
            f"was not seen at {converted}; convert the model with example inputs of this size"
        )
    for axis, count in enumerate(window.blocks(grid)):
        single = {window.blocks(other)[axis] == 1 for other in seen}
        if (count == 1) not in single and (count > 1 or window.shift[axis]):
            raise ConversionError(
                f"a {grid} map has {count} windows of {window.size[axis]} on axis {axis}, and {converted}, at "
                f"which it was converted, {window.blocks(converted)[axis]}: whether a single window is shifted differs "
                "from model to model; convert the model with example inputs of this size"
            )
