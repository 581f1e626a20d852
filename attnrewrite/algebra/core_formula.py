"""What a core of attention says of its cost: its own products and convolutions, without the site's projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

from sympy import Add, Expr, Integer, Symbol
from torch import nn

from ..ir.core import AttentionCore
from .site_formula import PREFIX, ZERO, A, C, Extent, N, P, SiteFormula, Widths, h


@dataclass(frozen=True)
class CoreSizes:
    """What a core is given, in sizes.

    Attributes:
        queries, keys: numbers of tokens, prefix included.
        sides: of the queries' map; None where they are known to lie on none.
        widths: channels in and out of the site, and those of all heads.
    """

    queries: Extent
    keys: Extent
    sides: tuple[Expr, Expr] | None
    widths: Widths

    def products(
        self, kind: str, pairs: Expr, values: dict[Symbol, Extent] | None = None, dense: Expr = ZERO
    ) -> SiteFormula:
        """Two products for each of ``pairs`` of a query and a key, and ``dense`` MACs of convolutions.

        ``N`` are the queries and ``P`` the keys, or ``N`` where these are as many; ``values`` are of other symbols.
        """
        a, bound = self.widths.inner, {N: self.queries, **self.widths.symbols, **(values or {})}
        keys = N
        if P not in bound and self.keys != self.queries:
            keys, bound[P] = P, self.keys
        pairs = pairs if P in bound else pairs.subs(P, N)
        return SiteFormula.of(
            kind, bound, dense=dense, core=Add(*(2 * a * term for term in Add.make_args(pairs))),
            attention_map=h * pairs, saved=2 * a * N + 2 * a * keys + h * pairs, moved=2 * a * N + 2 * a * keys,
            streams=2 * a * N if dense != 0 else ZERO,
        )  # fmt: skip


@runtime_checkable
class CostedCore(Protocol):
    """A core that knows its cost at every size. One without ``formula`` is counted by its operations."""

    def formula(self, sizes: CoreSizes) -> SiteFormula | None:
        """The cost per image; None for options or sizes that no formula covers."""


def is_costed(core: nn.Module) -> TypeGuard[CostedCore]:
    """Whether it is a core of attention that states its cost."""
    return isinstance(core, AttentionCore) and isinstance(core, CostedCore)


def core_formula(core: nn.Module, sizes: CoreSizes) -> SiteFormula | None:
    """Of a core as it is converted; None for one of no known cost."""
    return core.formula(sizes) if is_costed(core) else None


def map_tokens(prefix: int) -> Expr:
    """How many of the queries lie on the map."""
    return N - PREFIX if prefix else N


def pairs_with_prefix(seen: Expr, prefix: int) -> tuple[Expr, dict[Symbol, Extent]]:
    """Pairs where every token of the map sees ``seen`` keys and the prefix, which sees everything, with the values of
    the symbols in them."""
    if not prefix:
        return N * seen, {}
    return (N - PREFIX) * (seen + PREFIX) + PREFIX * N, {PREFIX: prefix}


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
