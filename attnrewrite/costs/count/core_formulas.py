"""What the cores that conversions install cost: their own products and convolutions, without the site's projections.

The map and prefix come from where a core stands; what it keeps of them from the core itself. A core that is in no table
here has no formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sympy import Add, Expr, Integer, Max, Min, Symbol, sympify
from torch import nn

from ...cores import (
    AggregatedCore,
    DecomposedManhattanCore,
    DenseAttention,
    GroupedCore,
    ManhattanCore,
    NeighborhoodAttention,
    OfMap,
    ReducedAggregatedCore,
    ReducedManhattanCore,
    ReducedNeighborhoodAttention,
    SlidingAttention,
    WindowAttention,
)
from ..algebra.formulas import fitting, window_pairs
from ..algebra.site_formula import COLUMNS, PAIRS, PREFIX, ROWS, ZERO, A, C, Extent, K, N, P, SiteFormula, Widths, h
from ..algebra.symbols import down, interval_pairs


@dataclass(frozen=True)
class Given:
    """What a core of attention is given.

    Attributes:
        queries, keys: numbers of tokens, prefix included.
        sides: of the queries' map; None where they are known to lie on none.
        widths: channels in and out of the site, and those of all heads.
    """

    queries: Extent
    keys: Extent
    sides: tuple[Extent, Extent] | None
    widths: Widths


def has_formula(core: nn.Module) -> bool:
    """Whether it is a core of maps of known cost."""
    return type(core) in _OF_MAPS


def core_formula(core: nn.Module, given: Given) -> SiteFormula | None:
    """Of a core as it is converted; None for a core of no known cost."""
    if isinstance(core, OfMap):
        return core_formula(core.core, given)
    if type(core) is DenseAttention:
        return _products("SA", given, N * P)
    formula = _OF_MAPS.get(type(core))
    return None if formula is None or given.sides is None else formula(core, given, *map(sympify, given.sides))


def between_maps(core: SiteFormula, maps: Sequence[SiteFormula]) -> SiteFormula:
    """A core with a site's linear maps and convolutions, in the core's symbols where they have the same values."""
    for each in maps:
        renamed = {name: _in_symbols_of(core, value) for name, value in each.values.items()}
        parts = {name: getattr(each, name).subs(renamed, simultaneous=True) for name in ("dense", "streams", "weights")}
        core = core.plus(**parts)
    return core.plus(saved=N * C)


def _in_symbols_of(core: SiteFormula, value: Expr) -> Expr:
    """``N``, ``P``, ``C`` or ``A``, or so many times a width; else the value itself."""
    for name in (N, P):
        if core.values.get(name) == value:
            return name
    for name in (C, A):
        width = core.values.get(name)
        if width is not None and isinstance(value, Integer) and value % width == 0:
            return value / width * name
    return value


def _products(
    kind: str,
    given: Given,
    pairs: Expr,
    values: dict[Symbol, Extent] | None = None,
    dense: Expr = ZERO,
) -> SiteFormula:
    """Two products a pair of query and key, and ``dense`` MACs of convolutions."""
    a, bound = given.widths.inner, {N: given.queries, **given.widths.symbols, **(values or {})}
    keys = N
    if P not in bound and given.keys != given.queries:
        keys, bound[P] = P, given.keys
    pairs = pairs if P in bound else pairs.subs(P, N)
    return SiteFormula(
        kind, dense=dense, core=Add(*(2 * a * term for term in Add.make_args(pairs))), attention_map=h * pairs,
        saved=2 * a * N + 2 * a * keys + h * pairs, moved=2 * a * N + 2 * a * keys,
        streams=2 * a * N if dense != 0 else ZERO, values={name: sympify(value) for name, value in bound.items()},
    )  # fmt: skip


def _with_prefix(seen: Expr, prefix: int) -> tuple[Expr, dict[Symbol, Extent]]:
    """Pairs where every token of the map sees ``seen`` keys and the prefix, which sees everything."""
    if not prefix:
        return N * seen, {}
    return (N - PREFIX) * (seen + PREFIX) + PREFIX * N, {PREFIX: prefix}


def _neighborhood(core: NeighborhoodAttention, given: Given, height: Expr, width: Expr) -> SiteFormula:
    pairs, values = _with_prefix(K, core.grid.prefix_tokens)
    return _products("NA", given, pairs, values | {K: _reach(core, height, width)})


def _sliding(core: SlidingAttention, given: Given, height: Expr, width: Expr) -> SiteFormula:
    return _products("NA", given, N * K, {K: _reach(core, height, width)})


def _reach(core: NeighborhoodAttention | SlidingAttention, height: Expr, width: Expr) -> Expr:
    """Keys that a kernel sees, cut to the map where it does not fit."""
    sides = zip(core.kernel_size, core.dilation, (height, width), strict=True)
    rows, columns = (Min(kernel, fitting(side, dilation)) for kernel, dilation, side in sides)
    return rows * columns


def _reduced(core: nn.Module, given: Given, height: Expr, width: Expr) -> SiteFormula:
    """Every reduced key is scored, whichever are masked or decayed."""
    return _products("reduced NA" if isinstance(core, ReducedNeighborhoodAttention) else "reduced MaSA", given, N * P)


def _windows(core: WindowAttention, given: Given, height: Expr, width: Expr) -> SiteFormula:
    return _products("block NA", given, PAIRS, {PAIRS: window_pairs(height, width, core.window)})


def _aggregated(core: AggregatedCore, given: Given, height: Expr, width: Expr) -> SiteFormula:
    """Keys and values are pooled, not what they are projected from. The window's scores, learned tokens and values are
    a product each."""
    rows, columns = (
        side if pool == 1 else Max(1, down(side, Integer(pool)))
        for side, pool in zip((height, width), core.pool, strict=True)
    )
    pairs, values = _with_prefix(P, core.grid.prefix_tokens)
    of_map = N - PREFIX if core.grid.prefix_tokens else N
    return _around(core, _products("AA", given, pairs, values | {P: rows * columns}), of_map, given.widths)


def _reduced_aggregated(core: ReducedAggregatedCore, given: Given, height: Expr, width: Expr) -> SiteFormula:
    return _around(core, _products("AA", given, N * P), N, given.widths)


def _around(core: Any, shared: SiteFormula, of_map: Expr, widths: Widths) -> SiteFormula:
    """With the window around each of ``of_map`` tokens, whose scores may be left out of the softmax."""
    if core.local is None:
        return shared
    scored = core.local.relative_pos_bias_local is not None
    map_of_window = h * of_map * K if scored else ZERO
    return shared.plus(
        {K: core.local.window_size**2}, core=(3 if scored else 2) * (K * widths.inner * of_map),
        attention_map=map_of_window, saved=map_of_window,
    )  # fmt: skip


def _manhattan(core: ManhattanCore, given: Given, height: Expr, width: Expr) -> SiteFormula:
    dense, values = _enhancement(core, given)
    return _products("MaSA", given, N * P, values, dense)


def _decomposed(core: DecomposedManhattanCore, given: Given, height: Expr, width: Expr) -> SiteFormula:
    """Along rows, then along columns, with both passes' maps; beside a gate the dense attention too."""
    dense, values = _enhancement(core, given)
    prefix = core.grid.prefix_tokens
    of_map, first = (N - PREFIX, PREFIX * N) if prefix else (N, ZERO)
    pairs = of_map * (ROWS + COLUMNS) + (N**2 if core.gate is not None else first)
    values |= {ROWS: height, COLUMNS: width, **({PREFIX: prefix} if prefix else {})}
    return _products("MaSA-d", given, pairs, values, dense)


def _enhancement(core: ManhattanCore | DecomposedManhattanCore, given: Given) -> tuple[Expr, dict[Symbol, Extent]]:
    """RMT's convolution of the map's values."""
    if core.lepe is None:
        return ZERO, {}
    prefix = core.grid.prefix_tokens
    of_map = N - PREFIX if prefix else N
    taps = core.lepe.conv.kernel_size
    return K * of_map * given.widths.inner, {K: taps[0] * taps[1], **({PREFIX: prefix} if prefix else {})}


def _grouped(core: GroupedCore, given: Given, height: Expr, width: Expr) -> SiteFormula | None:
    """``Q`` pairs in groups, whose tokens see the prefix too."""
    if core.position_bias is not None:
        return None
    prefix = core.grid.prefix_tokens
    rows, columns = (
        interval_pairs(side, Integer(group), Integer(interval))
        for side, group, interval in zip((height, width), core.group, core.interval, strict=True)
    )
    pairs = rows * columns + prefix * height * width + prefix * sympify(given.queries)
    return _products("SDA" if core.interval == (1, 1) else "LDA", given, PAIRS, {PAIRS: pairs})


_OF_MAPS: dict[type[nn.Module], Callable[[Any, Given, Expr, Expr], SiteFormula | None]] = {
    AggregatedCore: _aggregated,
    DecomposedManhattanCore: _decomposed,
    GroupedCore: _grouped,
    ManhattanCore: _manhattan,
    NeighborhoodAttention: _neighborhood,
    ReducedAggregatedCore: _reduced_aggregated,
    ReducedManhattanCore: _reduced,
    ReducedNeighborhoodAttention: _reduced,
    SlidingAttention: _sliding,
    WindowAttention: _windows,
}
