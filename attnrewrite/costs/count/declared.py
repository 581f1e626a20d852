"""Calls of cores and modules whose cost is the formula that they state, whatever operations they are made of.

Some products are not spelled as contractions (a window's scores are sums of shifted products), some contractions stand
for something else (an average written as a product with ones, position codes appended to keys). So that a cost is
that of the operator and not of its spelling, such a call is counted by its formula; ``Trace.executed`` keeps what its
operations contract.
"""

from __future__ import annotations

from typing import Any

from sympy import Integer
from torch import Tensor, nn

from ...algebra.core_formula import CoreSizes, core_formula
from ...algebra.module_formula import CostedModule, costed_module
from ...algebra.site_formula import SiteFormula, Widths
from ...cores.sequence import grid_of
from ...ir.core import AttentionCore
from ...ir.sites import Grid
from .cost import Cost


def is_counted_by_formula(module: nn.Module) -> bool:
    """Whether ``declared_cost`` may have something to say."""
    if isinstance(module, AttentionCore):
        return module.counted_by_formula
    costed = costed_module(module)
    return costed is not None and costed.costed_call.counted_by_formula


def declared_cost(module: nn.Module, arguments: dict[str, Any]) -> Cost | None:
    """MACs, and the price of absorbed norms, of one call; None for one that is counted by its operations."""
    if not is_counted_by_formula(module):
        return None
    if isinstance(module, AttentionCore):
        return _of_core(module, arguments)
    costed = costed_module(module)
    return None if costed is None else _of_module(costed, arguments)


def map_given(core: AttentionCore, query: tuple[int, ...], local_key: tuple[int, ...] | None) -> Grid | None:
    """The map that heads-last queries ``[batch, height, width, heads, dim]`` or ``[batch, tokens, heads, dim]`` have.

    ``local_key`` is the shape of the map's own keys, for cores that are given them. None for a sequence given to a core
    of no map.

    Raises:
        ConversionError: a sequence of no map of the core's aspect ratio.
    """
    shape = query if local_key is None else local_key
    if len(shape) == 5:
        return Grid(shape[1], shape[2])
    return None if core.grid is None else grid_of(shape[1], core.grid)


def _of_core(core: AttentionCore, arguments: dict[str, Any]) -> Cost | None:
    query, key = (arguments[name] for name in ("query", "key"))
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return None
    local = arguments.get("local_key")
    grid = map_given(core, tuple(query.shape), None if local is None else tuple(local.shape))
    if grid is None:
        return None
    heads, channels = query.shape[-2], query.shape[-2] * query.shape[-1]
    keys = grid.tokens if query.ndim == 5 else key.shape[1]
    sides = (Integer(grid.height), Integer(grid.width))
    formula = core_formula(core, CoreSizes(grid.tokens, keys, sides, Widths(channels, heads, channels)))
    return None if formula is None else _of_images(formula, query.shape[0])


def _of_module(module: CostedModule, arguments: dict[str, Any]) -> Cost | None:
    call = module.costed_call
    source = arguments[call.argument]
    if not call.is_plain(arguments) or not isinstance(source, Tensor):
        return None
    shape = tuple(source.shape)
    formula = module.formula(*map(Integer, call.sides(shape)))
    return None if formula is None else _of_images(formula, shape[0])


def _of_images(formula: SiteFormula, batch: int) -> Cost:
    """Of a formula whose values are numbers."""
    return Cost(formula.macs_of(batch, 1, 1), normalization=batch * formula.number(formula.normalization, 1, 1))
