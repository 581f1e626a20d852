"""Long and short distance attention (LSDA) of CrossFormer (Wang et al., ICLR 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sympy import Integer, Min, sympify
from torch import Tensor, nn

from ..algebra.module_formula import CostedCall
from ..algebra.site_formula import PAIRS, ZERO, C, E, Extent, G, N, SiteFormula, h
from ..algebra.symbols import group_pairs
from ..errors import ArgumentError, nearest
from ..functional import grouped_attention
from ..ir.heads import as_pair
from .dynamic_position_bias import DynamicPositionBias, central_table, relative_index
from .heads import require_heads, widths_of

Pair = tuple[int, int]

BIASES = ("dpb", "table", "both", "none")
PADDINGS = ("mask", "keys")
SMALL_MAPS = ("shrink", "global")


class LongShortDistanceAttention(nn.Module):
    """Attention inside groups of a map of any size: of neighbors (short), or of tokens ``interval`` apart (long).

    The map is cut into regions of ``group_size * interval`` tokens per side (short: an interval of 1). Tokens at the
    same place modulo the interval in the same region form a group. What depends on the map's size is decided at each
    call; an exported program with dynamic sizes keeps the branches of the map it was traced with: more than one
    region per axis, or a map that one group covers.

    Args:
        dim: channels in and out.
        num_heads: divides ``dim``.
        group_size: rows and columns of a group, or one number for both.
        interval: None for short distance, a number of steps for long, or ``"adaptive"`` for long with the fewest steps
            that make one region of the map: ``ceil(H / group_size)`` (with ``small_map="global"`` of the longer side).
        position_bias: ``"dpb"``, a ``DynamicPositionBias``; ``"table"``, a trained table, as Swin's; ``"both"``, their
            sum; ``"none"``.
        padding: at sides that regions do not divide. ``"mask"`` hides the padded keys (CrossFormer); ``"keys"``
            leaves them, with the biases of the key and value projection as key and value (Swin).
        centered: pad half in front, instead of all behind.
        small_map: for maps that a group covers on an axis; attention is then short. ``"shrink"`` cuts groups down to
            the shorter side (CrossFormer's classification models), ``"global"`` attends to the whole map (its dense
            backbones). On a square map these are the same.
        qkv_bias: whether the projections of query, key and value have biases.
        scale: of the dot products; None is ``head_dim ** -0.5``.

    Raises:
        ArgumentError: for arguments that have no meaning or do not fit each other.
    """

    costed_call = CostedCall()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int | tuple[int, int],
        interval: int | str | None = None,
        *,
        position_bias: str = "dpb",
        padding: str = "mask",
        centered: bool = False,
        small_map: str = "shrink",
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.group_size = as_pair(group_size)
        self._check(dim, num_heads, interval)
        check_choice("position_bias", position_bias, BIASES)
        check_choice("padding", padding, PADDINGS)
        check_choice("small_map", small_map, SMALL_MAPS)
        self.num_heads, self.interval = num_heads, interval
        self.position_bias, self.padding, self.centered, self.small_map = position_bias, padding, centered, small_map
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.pos = DynamicPositionBias(dim // 16, num_heads) if position_bias in ("dpb", "both") else None
        self.relative_position_bias_table: Tensor | None = None
        if position_bias in ("table", "both"):
            entries = (2 * self.group_size[0] - 1) * (2 * self.group_size[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _check(self, dim: int, num_heads: int, interval: int | str | None) -> None:
        require_heads(dim, num_heads)
        if min(self.group_size) < 1:
            raise ArgumentError(f"group_size: must be at least 1, got {self.group_size}")
        if isinstance(interval, str) and interval != "adaptive":
            raise ArgumentError(f"interval: must be a number, 'adaptive' or None, got {interval!r}")
        if isinstance(interval, int) and interval < 1:
            raise ArgumentError(f"interval: must be at least 1, got {interval}")

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape.

        Raises:
            ArgumentError: the groups of this map are larger than the position table.
        """
        sides = (source.shape[1], source.shape[2])
        group, interval = self.groups(*sides)
        (top, left), (bottom, right) = self.padding_of(sides, group, interval)
        bias = self.bias(*group)
        shift = ((-top) % (group[0] * interval[0]), (-left) % (group[1] * interval[1]))
        is_padded = self.padding == "keys"
        if is_padded:  # what the projections make of zeros are keys and values
            source, shift = F.pad(source, (0, 0, left, right, top, bottom)), (0, 0)
        query, key, value = self.qkv(source).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        mixed = grouped_attention(
            query, key, value, group, shift, self.scale, None if bias is None else bias[0], interval=interval
        )
        assert isinstance(mixed, Tensor)
        if is_padded:  # not a slice: its strides would bind an exported program to maps that need padding
            mixed = F.pad(mixed, (0, 0, 0, 0, -left, -right, -top, -bottom))
        return self.proj(mixed.flatten(-2))

    def formula(self, height: Extent, width: Extent) -> SiteFormula | None:
        """Groups of G x G neighbors (SDA) or of cells an interval apart (LDA): ``4NC² + 2QC`` for Q pairs of tokens,
        ``NG²`` of them where the groups divide the map. Maps that a group covers are one group, cut down to the shorter
        side. The position MLP of width E = C/16 runs once on ``(2G-1)²`` offsets. None for groups that are not square,
        and for other options than those of CrossFormer's classification models. (CrossFormer's own code projects and
        scores the padding of other maps too: ``4N̂C² + 2N̂G²C``.)"""
        rows, columns = self.group_size
        as_published = self.small_map == "shrink" and self.padding == "mask" and not self.centered
        if rows != columns or isinstance(self.interval, str) or not as_published:
            return None
        height, width, size = sympify(height), sympify(width), Integer(rows)
        widths, interval = widths_of(self.proj, self.num_heads), Integer(self.interval or 1)
        a, pairs, once = widths.inner, group_pairs(height, width, size, interval), ZERO
        values = {PAIRS: pairs, N: height * width, G: Min(size, height, width), **widths.symbols}
        if self.pos is not None:
            values[E] = Integer(widths.model // 16)
            once = (2 * G - 1) ** 2 * (2 * E + 2 * E**2 + E * h)
        return SiteFormula.of(
            "SDA" if interval == 1 else "LDA", values,
            dense=4 * C * a * N, core=2 * PAIRS * a, once=once, attention_map=h * PAIRS,
            saved=C * N + 4 * a * N + h * PAIRS, moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
        )  # fmt: skip

    def groups(self, height: int, width: int) -> tuple[Pair, Pair]:
        """Tokens of a group and the interval between them, (rows, columns), on a map of this size."""
        sides, group, interval = (height, width), self.group_size, self.interval
        if height <= group[0] or width <= group[1]:
            shorter = min(sides)
            shrunk = (min(group[0], shorter), min(group[1], shorter))
            group, interval = (sides if self.small_map == "global" else shrunk), None
        if interval == "adaptive":
            side = max(sides) if self.small_map == "global" else height
            steps = (-(-side // group[0]), -(-side // group[1]))
        else:
            steps = as_pair(1 if interval is None else int(interval))
        return group, steps

    def padding_of(self, sides: Pair, group: Pair, interval: Pair) -> tuple[Pair, Pair]:
        """Rows and columns before and after a map that fill it up to whole regions."""
        below, right = (-side % (size * step) for side, size, step in zip(sides, group, interval, strict=True))
        above, left = (below // 2, right // 2) if self.centered else (0, 0)
        return (above, left), (below - above, right - left)

    def bias(self, rows: int, columns: int) -> Tensor | None:
        """``[1, num_heads, n, n]`` of the ``n = rows * columns`` queries and keys of a group."""
        entries = None if self.pos is None else self.pos.table(rows, columns)
        if self.relative_position_bias_table is not None:
            held = central_table(self.relative_position_bias_table, self.group_size, (rows, columns))
            entries = held if entries is None else entries + held
        if entries is None:
            return None
        return entries[relative_index(rows, columns, entries.device)].permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        return (
            f"group_size={self.group_size}, interval={self.interval}, num_heads={self.num_heads}, "
            f"position_bias={self.position_bias!r}, padding={self.padding!r}, small_map={self.small_map!r}"
        )


def check_choice(argument: str, value: str, known: tuple[str, ...]) -> None:
    """Raises:
    ArgumentError: the value is none of the known ones.
    """
    if value not in known:
        raise ArgumentError(f"{argument}: must be one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}")
