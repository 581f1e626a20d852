"""Manhattan self-attention (MaSA) of RMT (Fan et al., CVPR 2024)."""

from __future__ import annotations

from sympy import Expr
from torch import Tensor, nn

from ..algebra.module_formula import CostedCall
from ..algebra.site_formula import COLUMNS, ROWS, ZERO, C, Extent, K, N, SiteFormula, h
from ..operators.manhattan_attention import ManhattanGeometry, check_placement, manhattan_attention
from .decay import ManhattanPosition, PositionTables, rotate
from .depthwise import DepthwiseConv
from .heads import require_heads, widths_of


class ManhattanAttention(nn.Module):
    """Attention whose weights decay with the Manhattan distance on the map, for maps of any size.

    ``out_proj(attention + lepe(value))``, the attention being ``manhattan_attention`` of the projected map and ``lepe``
    a depthwise 5 x 5 convolution, the paper's local context enhancement. It holds no table: see ``ManhattanPosition``.

    Args:
        dim: channels of the map.
        num_heads: heads; they divide ``dim``.
        decomposed: attend along rows, then along columns, instead of to the whole map.
        initial_decay, decay_range, rotary: of ``ManhattanPosition``.
        decay_placement: ``"inside"`` or ``"outside"`` the softmax, of ``ManhattanGeometry``.
        lce: whether there is a local context enhancement.

    Raises:
        ArgumentError: if the heads do not divide the channels, or for an unknown placement.
    """

    costed_call = CostedCall(beside=("tables",), counted_by_formula=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decomposed: bool = False,
        initial_decay: float = 2,
        decay_range: float = 4,
        rotary: str = "raster",
        decay_placement: str = "inside",
        lce: bool = True,
    ) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        check_placement(decay_placement, "decay_placement")
        self.num_heads, self.decomposed, self.decay_placement = num_heads, decomposed, decay_placement
        self.position = ManhattanPosition(dim // num_heads, num_heads, initial_decay, decay_range, rotary)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DepthwiseConv(dim, 5) if lce else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, source: Tensor, tables: PositionTables | None = None) -> Tensor:
        """``[B, H, W, dim]`` to the same shape.

        Args:
            source: the map.
            tables: of its size, shared by several blocks; None computes them.
        """
        height, width = source.shape[1:3]
        tables = tables or self.position(height, width, source)
        value = self.v_proj(source)
        query, key, heads = (
            part.unflatten(-1, (self.num_heads, -1)) for part in (self.q_proj(source), self.k_proj(source), value)
        )
        if tables.cos is not None and tables.sin is not None:
            query, key = (rotate(part, tables.cos, tables.sin) for part in (query, key))
        geometry = ManhattanGeometry(height, width, decomposed=self.decomposed, placement=self.decay_placement)
        mixed = manhattan_attention(query, key, heads, tables.log_decay, geometry).flatten(-2)
        return self.out_proj(mixed if self.lepe is None else mixed + self.lepe(value))

    def formula(self, height: Extent, width: Extent) -> SiteFormula:
        """``4NC² + 2N²C + 25NC``, or along rows and columns ``4NC² + 2N(H + W)C + 25NC``."""
        widths = widths_of(self.out_proj, self.num_heads)
        a, around = widths.inner, ZERO if self.lepe is None else K
        values = {N: height * width, **widths.symbols}
        if self.lepe is not None:
            values[K] = self.lepe.conv.kernel_size[0] ** 2
        if self.decomposed:
            values |= {ROWS: height, COLUMNS: width}
            keys, operands = ROWS + COLUMNS, 8 * a * N
            along_both: Expr = ManhattanGeometry(ROWS, COLUMNS, decomposed=True).macs(1, a, a)
            products = along_both.subs(ROWS * COLUMNS, N)
        else:
            keys, operands = N, 4 * a * N
            products = ManhattanGeometry(N, 1).macs(1, a, a)
        return SiteFormula.of(
            "MaSA-d" if self.decomposed else "MaSA", values,
            dense=4 * N * C * a + around * N * a, core=products, attention_map=h * N * keys,
            saved=C * N + operands + h * N * keys, moved=operands,
            streams=2 * C * N + 6 * a * N, weights=4 * C * a + around * a,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, decomposed={self.decomposed}, decay_placement={self.decay_placement!r}"
