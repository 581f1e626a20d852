"""The cost of every building block as a formula in its own symbols.

Sources: the table of the building blocks is from the papers named at each function; every formula is checked against a
count of the operations (``tests/costs``). Per image unless named ``once``; MAC is one multiply-accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sympy import Expr, Integer, Max, Min, Symbol, sympify

from ...ir.sites import Interleaved, Window
from .site_formula import (
    COLUMNS,
    OUT,
    PADDED,
    PAIRS,
    PREFIX,
    ROWS,
    STATE,
    TABLE,
    ZERO,
    C,
    D,
    E,
    Extent,
    G,
    K,
    N,
    P,
    R,
    SiteFormula,
    Widths,
    h,
)
from .symbols import block_pairs, down, group_pairs, grouped_side, strided, symbol, up


def _formula(kind: str, values: dict[Symbol, Extent], **parts: Expr) -> SiteFormula:
    return SiteFormula(kind, values={name: sympify(value) for name, value in values.items()}, **parts)


def self_attention(tokens: Extent, widths: Widths) -> SiteFormula:
    """Every token sees every token (Vaswani et al. 2017): ``4NC² + 2N²C``."""
    a = widths.inner
    return _formula(
        "SA", {N: tokens, **widths.symbols},
        dense=4 * N * C * a, core=2 * N**2 * a, attention_map=h * N**2, saved=C * N + 4 * a * N + h * N**2,
        moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
    )  # fmt: skip


def cross_attention(tokens: Extent, keys: Extent, key_width: int, widths: Widths) -> SiteFormula:
    """Queries of ``tokens`` see ``keys`` others, of ``key_width`` channels."""
    a = widths.inner
    width = C if key_width == widths.model else D
    return _formula(
        "XA", {N: tokens, P: keys, D: key_width, **widths.symbols},
        dense=2 * N * C * a + 2 * P * width * a, core=2 * N * P * a, attention_map=h * N * P,
        saved=C * N + 2 * a * N + width * P + 2 * a * P + h * N * P, moved=2 * a * N + 2 * a * P,
    )  # fmt: skip


def window_attention(height: Extent, width: Extent, window: tuple[int, int], widths: Widths) -> SiteFormula:
    """Swin's windows (Liu et al. 2021) on a map padded to them: ``N̂(4C² + 2M²C)``; a shift costs nothing."""
    a, padded = widths.inner, up(height, window[0]) * window[0] * up(width, window[1]) * window[1]
    return _formula(
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
    return _formula(
        "block NA", {N: height * width, PAIRS: window_pairs(height, width, window), **widths.symbols},
        dense=4 * N * C * a, core=2 * PAIRS * a, attention_map=h * PAIRS, saved=C * N + 4 * a * N + h * N,
        moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
    )  # fmt: skip


def reduced_attention(tokens: Extent, keys: Extent, kernel: int, reduced: bool, widths: Widths) -> SiteFormula:
    """Spatial reduction (PVT, Wang et al. 2021): keys from a strided convolution of ``kernel`` = R, or from a pooled
    map with a 1x1 convolution (``kernel`` 1): ``2NC² + PR²C² + 2PC² + 2NPC``."""
    a = widths.inner
    convolution = P * R**2 * C**2 if reduced else ZERO
    return _formula(
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
    a = widths.inner
    seen = Min(kernel[0], fitting(height, dilation[0])) * Min(kernel[1], fitting(width, dilation[1]))
    cells = height * width
    if prefix:
        pairs, extra = (N - PREFIX) * (K + PREFIX) + PREFIX * N, {PREFIX: prefix}
    else:
        pairs, extra = N * K, {}
    return _formula(
        "NA", {N: cells + prefix, K: seen, **extra, **widths.symbols},
        dense=4 * N * C * a, core=2 * pairs * a, attention_map=h * pairs, saved=C * N + 4 * a * N + h * N,
        moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
    )  # fmt: skip


def fitting(side: Extent, dilation: int) -> Expr:
    """The longest kernel that an axis holds."""
    return sympify(side) if dilation == 1 else Max(1, down(sympify(side), Integer(dilation)))


def aggregated_attention(
    tokens: Extent, pooled: Extent, window_size: int, widths: Widths, *, learnable: bool = True
) -> SiteFormula:
    """TransNeXt's aggregated attention (Shi 2024): k² neighbors and P pooled cells in one softmax, and with
    ``learnable`` tokens a third ``Nk²C``: ``5NC² + 2PC² + 2NPC + 3Nk²C``. Without them it is pixel-focused attention,
    ``2Nk²C``. The position MLP is separate (``with_position_mlp``)."""
    a, local = widths.inner, (3 if learnable else 2)
    maps = h * N * (K + P)
    return _formula(
        "AA" if learnable else "PFA", {N: tokens, P: pooled, K: window_size**2, **widths.symbols},
        dense=5 * N * C * a + 2 * P * C * a, core=2 * N * P * a + local * N * K * a,
        attention_map=maps, saved=C * N + 4 * a * N + 2 * a * P + maps, moved=4 * a * N + 2 * a * P,
        streams=2 * C * N + 6 * a * N + C * P + 2 * a * P, weights=5 * C * a,
    )  # fmt: skip


def with_position_mlp(formula: SiteFormula, offsets: Extent, width: int) -> SiteFormula:
    """And the log-spaced continuous position bias (Liu et al. 2022): an MLP of 2 to ``width`` = E to heads channels,
    once for each of T relative offsets, whatever the batch: ``T(2E + Eh)``. It can be folded at a fixed size."""
    values = formula.values | {TABLE: sympify(offsets), E: Integer(width)}
    return replace(formula, once=formula.once + TABLE * (2 * E + E * h), values=values)


def manhattan_attention(
    height: Extent, width: Extent, widths: Widths, *, decomposed: bool, local: int = 5, prefix: int = 0
) -> SiteFormula:
    """RMT's Manhattan self-attention (Fan et al. 2024) with its ``local`` x ``local`` depthwise convolution of the
    values: full ``4NC² + 2N²C + 25NC``, or along rows and columns ``4NC² + 2N(H+W)C + 25NC``."""
    a = widths.inner
    values = {N: height * width + prefix, **widths.symbols, **({K: local**2} if local else {})}
    around = K if local else ZERO
    if not decomposed:
        return _formula(
            "MaSA", values,
            dense=4 * N * C * a + around * N * a, core=2 * N**2 * a, attention_map=h * N**2,
            saved=C * N + 4 * a * N + h * N**2, moved=4 * a * N,
            streams=2 * C * N + 6 * a * N, weights=4 * C * a + around * a,
        )  # fmt: skip
    values |= {ROWS: height, COLUMNS: width}
    return _formula(
        "MaSA-d", values,
        dense=4 * N * C * a + around * N * a, core=2 * N * (ROWS + COLUMNS) * a, attention_map=h * N * (ROWS + COLUMNS),
        saved=C * N + 8 * a * N + h * N * (ROWS + COLUMNS), moved=8 * a * N,
        streams=2 * C * N + 6 * a * N, weights=4 * C * a + around * a,
    )  # fmt: skip


def long_short_attention(
    height: Extent, width: Extent, group: int, interval: int, widths: Widths, *, position_bias: bool = True
) -> SiteFormula:
    """CrossFormer's groups (Wang et al. 2022) of G x G neighbors (``interval`` 1, SDA) or of cells ``interval`` apart
    (LDA): ``4NC² + 2QC`` for Q pairs of tokens, ``NG²`` of them where the groups divide the map. Maps that a group
    covers are one group, cut down to the shorter side. The position MLP of width E = C/16 runs once on ``(2G-1)²``
    offsets. (CrossFormer's own code projects and scores the padding of other maps too: ``4N̂C² + 2N̂G²C``.)"""
    a = widths.inner
    height, width, size = sympify(height), sympify(width), Integer(group)
    values = {PAIRS: group_pairs(height, width, size, Integer(interval)), N: height * width,
              G: Min(size, height, width), **widths.symbols}  # fmt: skip
    once = ZERO
    if position_bias:
        values[E] = Integer(widths.model // 16)
        once = (2 * G - 1) ** 2 * (2 * E + 2 * E**2 + E * h)
    return _formula(
        "SDA" if interval == 1 else "LDA", values,
        dense=4 * C * a * N, core=2 * PAIRS * a, once=once, attention_map=h * PAIRS,
        saved=C * N + 4 * a * N + h * PAIRS, moved=4 * a * N, streams=2 * C * N + 4 * a * N, weights=4 * C * a,
    )  # fmt: skip


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
    return _formula(
        kind[gated, bool(depthwise)], values,
        dense=first + N * D * out_symbol + (K * N * D if depthwise else 0), saved=saved,
        streams=N * (C + 2 * D + out_symbol) + (N * D if gated else 0) + (2 * N * D if depthwise else 0),
        weights=(2 if gated else 1) * C * D + D * out_symbol + (K * D if depthwise else 0),
    )  # fmt: skip


def linear(tokens: Extent, width: int, out: int) -> SiteFormula:
    """One linear map on its own."""
    return _formula("linear", {N: tokens, C: width, OUT: out}, dense=N * C * OUT,
                    streams=N * (C + OUT), weights=C * OUT)  # fmt: skip


def patch_embedding(height: Extent, width: Extent, channels: int, out: int, kernel: tuple[int, int]) -> SiteFormula:
    """A strided convolution, or a gather of patches with a linear map, to a map of ``height x width``."""
    return _formula(
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


def token_transformer(tokens: Extent, patch: int, width: int, *, performer: bool) -> SiteFormula:
    """One stage of T2T (Yuan et al. 2021) on soft-split tokens of ``patch`` channels: a one-head transformer of
    ``width`` = e, ``N(3De + 3e²) + 2N²e``, or a performer with m = e/2 random features."""
    values = {N: tokens, D: patch, E: width}
    if not performer:
        return _formula(
            "T2T", values, dense=N * (3 * D * E + 3 * E**2), core=2 * N**2 * E, attention_map=N**2,
            saved=D * N + 5 * E * N + N**2, moved=4 * E * N,
        )  # fmt: skip
    values[STATE] = width // 2
    return _formula(
        "T2T-p", values, dense=N * (3 * D * E + 3 * E**2), core=N * (4 * E * STATE + STATE),
        saved=D * N + 7 * E * N, moved=4 * E * N,
    )  # fmt: skip


SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Kernel, stride and padding of T2T's overlapping patches."""


def soft_splits(height: Extent, width: Extent) -> list[tuple[Expr, Expr]]:
    """The sides of the map after each split."""
    sides, made = (sympify(height), sympify(width)), []
    for split in SOFT_SPLITS:
        sides = (strided(sides[0], *split), strided(sides[1], *split))
        made.append(sides)
    return made


def tokens_to_token(
    height: Expr, width: Expr, channels: int, out: int, *, widths_inside: tuple[int, int], performer: bool
) -> SiteFormula:
    """T2T's stem: soft splits 7/4/2 and 3/2/1 with a ``token_transformer`` after each, then 3/2/1 and a linear map."""
    tokens = [rows * columns for rows, columns in soft_splits(height, width)]
    patches = [kernel**2 for kernel, _, _ in SOFT_SPLITS]
    first, second = widths_inside
    stages = [
        token_transformer(tokens[0], patches[0] * channels, first, performer=performer),
        token_transformer(tokens[1], patches[1] * first, second, performer=performer),
    ]
    apart = (N, D) if first == second else (N, D, E, STATE)
    found, last = SiteFormula("T2T stem", dense=ZERO), E
    for index, stage in enumerate(stages, start=1):
        own = {name: symbol(f"{name}_{index}") for name in apart}
        values = {own.get(name, name): value for name, value in stage.values.items()}
        parts = {name: getattr(stage, name) for name in ("dense", "core", "attention_map", "saved")}
        found = found.plus(values, **{name: part.subs(own, simultaneous=True) for name, part in parts.items()})
        last = own.get(E, E)
    return found.plus({OUT: out, N: tokens[2]}, dense=9 * last * OUT * N)


def cells(height: Expr, width: Expr, ratio: int) -> Expr:
    """Of a map reduced by ``ratio`` a side."""
    return down(height, Integer(ratio)) * down(width, Integer(ratio))
