"""The cost of every building block as a formula in its own symbols.

Sources: the table of the building blocks is from the papers named at each function; every formula is checked against a
count of the operations (``tests/algebra``). Per image unless named ``once``; MAC is one multiply-accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sympy import Expr, Integer, Max, Min, Symbol, sympify

from ..ir.sites import Interleaved, Window
from .site_formula import (
    OUT,
    PADDED,
    PAIRS,
    PREFIX,
    ZERO,
    C,
    D,
    Extent,
    K,
    N,
    P,
    R,
    SiteFormula,
    Widths,
    h,
)
from .symbols import block_pairs, down, grouped_side, symbol, up


def self_attention(tokens: Extent, widths: Widths) -> SiteFormula:
    """Every token sees every token (Vaswani et al. 2017): ``4NC² + 2N²C``."""
    a = widths.inner
    return SiteFormula.of(
        "SA", {N: tokens, **widths.symbols},
        dense=4 * N * C * a, core=2 * N**2 * a, attention_map=h * N**2, saved=C * N + 4 * a * N + h * N**2,
        moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
    )  # fmt: skip


def cross_attention(tokens: Extent, keys: Extent, key_width: int, widths: Widths) -> SiteFormula:
    """Queries of ``tokens`` see ``keys`` others, of ``key_width`` channels."""
    a = widths.inner
    width = C if key_width == widths.model else D
    return SiteFormula.of(
        "XA", {N: tokens, P: keys, D: key_width, **widths.symbols},
        dense=2 * N * C * a + 2 * P * width * a, core=2 * N * P * a, attention_map=h * N * P,
        saved=C * N + 2 * a * N + width * P + 2 * a * P + h * N * P, moved=2 * a * N + 2 * a * P,
    )  # fmt: skip


def window_attention(height: Extent, width: Extent, window: tuple[int, int], widths: Widths) -> SiteFormula:
    """Swin's windows (Liu et al. 2021) on a map padded to them: ``N̂(4C² + 2M²C)``; a shift costs nothing."""
    a, padded = widths.inner, up(height, window[0]) * window[0] * up(width, window[1]) * window[1]
    return SiteFormula.of(
        "WSA", {PADDED: padded, K: window[0] * window[1], **widths.symbols},
        dense=4 * C * a * PADDED, core=2 * K * a * PADDED, attention_map=h * K * PADDED,
        saved=C * PADDED + 4 * a * PADDED + h * K * PADDED, moved=4 * a * PADDED,
        streams=2 * C * PADDED + 4 * a * PADDED, weights=4 * C * a,
    )  # fmt: skip


def interleaved_attention(
    height: Extent, width: Extent, groups: Interleaved, widths: Widths, *, one_region: bool
) -> SiteFormula:
    """The same count for groups of tokens that lie apart (LDA), on a map padded to whole regions of them. A group that
    reaches over the map (``one_region``) is taken to keep its size on another: a table of its bias has one size."""
    made = replace(window_attention(height, width, groups.size, widths), kind="LDA")
    if one_region:
        return made
    rows, columns = (
        grouped_side(sympify(side), Integer(group), Integer(interval))
        for side, group, interval in zip((height, width), groups.group, groups.interval, strict=True)
    )
    return replace(made, values=made.values | {PADDED: rows * columns})


def window_pairs(height: Extent, width: Extent, window: Window) -> Expr:
    """Pairs of a token and a slot of its block."""
    flags = Integer(window.padding_keys), Integer(window.rolled_first)
    rows, columns = (
        block_pairs(sympify(side), Integer(size), Integer(offset), *flags)
        for side, size, offset in zip((height, width), window.size, window.shift, strict=True)
    )
    return rows * columns


def block_attention(height: Extent, width: Extent, window: Window, widths: Widths) -> SiteFormula:
    """The same without padding and roll: blocks are cut where they lie, and count with the slots they have.

    ``Q`` is the number of (token, slot) pairs; ``NM²`` where the window divides the map and nothing is shifted.
    """
    a = widths.inner
    return SiteFormula.of(
        "block NA", {N: height * width, PAIRS: window_pairs(height, width, window), **widths.symbols},
        dense=4 * N * C * a, core=2 * PAIRS * a, attention_map=h * PAIRS, saved=C * N + 4 * a * N + h * N,
        moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
    )  # fmt: skip


def reduced_attention(tokens: Extent, keys: Extent, kernel: int, reduced: bool, widths: Widths) -> SiteFormula:
    """Spatial reduction (PVT, Wang et al. 2021): keys from a strided convolution of ``kernel`` = R, or from a pooled
    map with a 1x1 convolution (``kernel`` 1): ``2NC² + PR²C² + 2PC² + 2NPC``."""
    a = widths.inner
    convolution = P * R**2 * C**2 if reduced else ZERO
    return SiteFormula.of(
        "SRA", {N: tokens, P: keys, R: kernel, **widths.symbols},
        dense=2 * N * C * a + convolution + 2 * P * C * a, core=2 * N * P * a, attention_map=h * N * P,
        saved=C * N + 2 * a * N + C * P + 2 * a * P + h * N * P, moved=2 * a * N + 2 * a * P,
        streams=3 * C * N + 2 * a * N + 2 * C * P + 2 * a * P, weights=4 * C * a + (R**2 * C**2 if reduced else ZERO),
    )  # fmt: skip


def neighborhood_attention(
    height: Extent, width: Extent, prefix: int, kernel: tuple[int, int], dilation: tuple[int, int], widths: Widths
) -> SiteFormula:
    """Each map token sees the ``K = k²`` nearest (Hassani et al. 2023) and every prefix token, which see everything:
    ``4NC² + 2Nk²C``, whatever the dilation. A kernel that does not fit a map is clamped to it."""
    a, seen = widths.inner, kernel_keys(height, width, kernel, dilation)
    cells = height * width
    if prefix:
        pairs, extra = (N - PREFIX) * (K + PREFIX) + PREFIX * N, {PREFIX: prefix}
    else:
        pairs, extra = N * K, {}
    return SiteFormula.of(
        "NA", {N: cells + prefix, K: seen, **extra, **widths.symbols},
        dense=4 * N * C * a, core=2 * pairs * a, attention_map=h * pairs, saved=C * N + 4 * a * N + h * N,
        moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
    )  # fmt: skip


def kernel_keys(height: Extent, width: Extent, kernel: tuple[int, int], dilation: tuple[int, int]) -> Expr:
    """Keys that a kernel sees, cut to the map where it does not fit."""
    return Min(kernel[0], _fitting(height, dilation[0])) * Min(kernel[1], _fitting(width, dilation[1]))


def _fitting(side: Extent, dilation: int) -> Expr:
    """The longest kernel that an axis holds."""
    return sympify(side) if dilation == 1 else Max(1, down(sympify(side), Integer(dilation)))


def mlp(
    tokens: Extent, width: int, hidden: int, out: int | None = None, *, gated: bool = False, depthwise: int = 0
) -> SiteFormula:
    """Two linear maps (``2NCD``), a depthwise convolution of ``depthwise`` = k between them (``+ k²ND``, as in
    ConvFFN), or a gate, for which the first map makes ``2D`` (``3NCD``, GLU; with ``depthwise`` ConvGLU)."""
    out_symbol = C if out in (None, width) else OUT
    values: dict[Symbol, Extent] = {N: tokens, C: width, D: hidden}
    values |= {OUT: out} if out_symbol is OUT and out is not None else {}
    values |= {K: depthwise**2} if depthwise else {}
    kind = {(False, False): "MLP", (False, True): "ConvFFN", (True, False): "GLU", (True, True): "ConvGLU"}
    first = (2 if gated else 1) * N * C * D
    saved = (C + (4 if gated else 2) * D + (D if depthwise else 0)) * N
    return SiteFormula.of(
        kind[gated, bool(depthwise)], values,
        dense=first + N * D * out_symbol + (K * N * D if depthwise else 0), saved=saved,
        streams=N * (C + 2 * D + out_symbol) + (N * D if gated else 0) + (2 * N * D if depthwise else 0),
        weights=(2 if gated else 1) * C * D + D * out_symbol + (K * D if depthwise else 0),
    )  # fmt: skip


def linear(tokens: Extent, width: int, out: int) -> SiteFormula:
    """One linear map on its own."""
    return SiteFormula.of("linear", {N: tokens, C: width, OUT: out}, dense=N * C * OUT,
                    streams=N * (C + OUT), weights=C * OUT)  # fmt: skip


def patch_embedding(height: Extent, width: Extent, channels: int, out: int, kernel: tuple[int, int]) -> SiteFormula:
    """A strided convolution, or a gather of patches with a linear map, to a map of ``height x width``."""
    return SiteFormula.of(
        "stem", {N: height * width, C: channels, OUT: out, K: kernel[0] * kernel[1]},
        dense=N * K * C * OUT, streams=N * (K * C + OUT), weights=K * C * OUT,
    )  # fmt: skip


def cross_scale_embedding(
    sides: Callable[[int], tuple[Extent, Extent]], channels: int, out: int, kernels: Sequence[int]
) -> SiteFormula:
    """CrossFormer's embedding: one convolution a kernel size, the larger the kernel the fewer of the ``out`` channels
    (C/2, C/4, …, the last twice). ``sides(kernel)`` is the map one kernel makes."""
    dense, values = ZERO, {C: sympify(channels)}
    for index, kernel in enumerate(sorted(kernels)):
        share = out // 2 ** min(index + 1, len(kernels) - 1)
        rows, columns = sides(kernel)
        cells = symbol(f"N_{kernel}")
        values[cells] = sympify(rows * columns)
        dense += cells * kernel**2 * C * share
    return SiteFormula("CEL", dense=dense, values=values)


def cells(height: Expr, width: Expr, ratio: int) -> Expr:
    """Of a map reduced by ``ratio`` a side."""
    return down(height, Integer(ratio)) * down(width, Integer(ratio))
