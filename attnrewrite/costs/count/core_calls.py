"""Calls of the cores that conversions install: what each is given, and what those defined by formula cost."""

from __future__ import annotations

from typing import Any

from sympy import Integer
from torch import Tensor, nn

from ...cores import AggregatedCore, ReducedAggregatedCore, WindowAttention
from ...cores.sequence import grid_of
from ...ir.sites import Grid
from ..algebra.site_formula import Widths
from .core_formulas import Given, core_formula
from .cost import Cost

BY_DEFINITION = (AggregatedCore, ReducedAggregatedCore, WindowAttention)
"""Whose products are sums of shifted ones, stand for averages, or are made in larger blocks than there are."""


def map_given(core: Any, query: tuple[int, ...], local_key: tuple[int, ...] | None) -> Grid:
    """The map that heads-last queries ``[batch, height, width, heads, dim]`` or ``[batch, tokens, heads, dim]`` have.

    ``local_key`` is the shape of the map's own keys, for cores that are given them.

    Raises:
        ConversionError: a sequence of no map of the core's aspect ratio.
    """
    shape = query if local_key is None else local_key
    return Grid(shape[1], shape[2]) if len(shape) == 5 else grid_of(shape[1], core.grid)


def cost_of_core_call(core: nn.Module, arguments: dict[str, Any]) -> Cost | None:
    """MACs, and what fvcore charges for pooling; None for cores that are counted by their operations."""
    if type(core) not in BY_DEFINITION:
        return None
    query, key = (arguments[name] for name in ("query", "key"))
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return None
    local = arguments.get("local_key")
    grid = map_given(core, tuple(query.shape), None if local is None else tuple(local.shape))
    heads, channels = query.shape[-2], query.shape[-2] * query.shape[-1]
    keys = grid.tokens if query.ndim == 5 else key.shape[1]
    given = Given(grid.tokens, keys, (Integer(grid.height), Integer(grid.width)), Widths(channels, heads, channels))
    formula = core_formula(core, given)
    if formula is None:
        return None
    pooled = 0
    if isinstance(core, AggregatedCore) and core.pool != (1, 1):
        pooled = 2 * grid.height * grid.width * channels
    return Cost(formula.macs_of(query.shape[0], 1, 1), normalization=query.shape[0] * pooled)
