"""The cost of one site as expressions in symbols of its own, which have values in the image's sides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

from sympy import Expr, Integer, Symbol, sympify

from .symbols import H, W, order, symbol

Extent: TypeAlias = Any
"""An expression or a number."""

N, P, C, A, h, K = (symbol(name) for name in ("N", "P", "C", "A", "h", "K"))
D, E, OUT, R, G = (symbol(name) for name in ("D", "E", "O", "R", "G"))
ROWS, COLUMNS, PADDED, PAIRS, TABLE, PREFIX, STATE = (symbol(s) for s in ("H_s", "W_s", "N̂", "Q", "T", "t", "m"))
ZERO = Integer(0)

LAYER_NORM, BATCH_NORM = 5, 2
"""What fvcore charges an element of a normalization."""


@dataclass(frozen=True)
class SiteFormula:
    """One site's cost per image, in local symbols whose values are numbers or expressions in ``H`` and ``W``.

    Attributes:
        kind: short name, e.g. ``SA``, ``WSA``, ``NA``.
        dense: MACs of linear maps and convolutions; ``core``: of the attention products.
        once: MACs that do not grow with the batch (position MLPs), constant-foldable at a fixed size.
        attention_map: elements of the softmax inputs.
        normalization: what fvcore charges for norms and poolings inside that are no operations of their own.
        saved: elements kept for the backward pass by the unfused form, without norms and position bias.
        moved: elements a fused core reads and writes at least; ``streams``: the linear maps likewise, and ``weights``
            elements of their weights, once for the whole batch.
        values: of the local symbols.
    """

    kind: str
    dense: Expr
    core: Expr = ZERO
    once: Expr = ZERO
    attention_map: Expr = ZERO
    normalization: Expr = ZERO
    saved: Expr = ZERO
    moved: Expr = ZERO
    streams: Expr = ZERO
    weights: Expr = ZERO
    values: dict[Symbol, Expr] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, values: dict[Symbol, Extent], **parts: Expr) -> SiteFormula:
        """With values that may be plain numbers."""
        return cls(kind, values={name: sympify(value) for name, value in values.items()}, **parts)

    @property
    def macs(self) -> Expr:
        """MACs of one image on its own, in local symbols."""
        return self.dense + self.core + self.once

    def in_pixels(self, expression: Expr) -> Expr:
        """An expression in local symbols, in ``H`` and ``W``."""
        return _substituted(expression, frozenset(self.values.items()))

    def number(self, expression: Expr, height: int, width: int) -> int:
        """The value of an expression in local symbols at one size."""
        return _number(self.in_pixels(expression), height, width)

    def macs_of(self, batch: int, height: int, width: int) -> int:
        """MACs of a call on ``batch`` images."""
        return batch * self.number(self.dense + self.core, height, width) + self.number(self.once, height, width)

    @cached_property
    def total(self) -> Expr:
        return self.in_pixels(self.macs)

    @property
    def order(self) -> str:
        return order(self.total)

    def plus(self, values: dict[Symbol, Extent] | None = None, **parts: Expr) -> SiteFormula:
        """With more of some parts, in symbols of which ``values`` gives the new ones."""
        bound = {name: sympify(value) for name, value in (values or {}).items()}
        sums = {name: getattr(self, name) + part for name, part in parts.items()}
        return replace(self, values=self.values | bound, **sums)


@lru_cache(maxsize=4096)
def _substituted(expression: Expr, values: frozenset[tuple[Symbol, Expr]]) -> Expr:
    """Blocks repeat, and substitution is slow."""
    return expression.subs(dict(values), simultaneous=True)


@lru_cache(maxsize=4096)
def _number(expression: Expr, height: int, width: int) -> int:
    return int(expression.subs({H: height, W: width}, simultaneous=True))


@dataclass(frozen=True)
class Widths:
    """Channels ``model`` in and out, ``attention`` = heads times head_dim inside."""

    model: int
    heads: int
    attention: int

    @property
    def symbols(self) -> dict[Symbol, Extent]:
        inner = {} if self.attention == self.model else {A: self.attention}
        return {C: self.model, h: self.heads, **inner}

    @property
    def inner(self) -> Symbol:
        return C if self.attention == self.model else A
