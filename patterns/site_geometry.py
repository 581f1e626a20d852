"""What the targets of attention ask of a site: its map, its bias, and how much of its attention a mask keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ArgumentError, Refusal
from ..ir.heads import as_pair
from ..ir.sites import AttentionSite, Global, Grid, Interleaved, MapGroups, Reduced, Window
from ..operators.index_rule import reached_table
from .relative_table import relative_table

Pair = tuple[int, int]


def grid_of_site(site: AttentionSite) -> Grid:
    """The map that a global or reduced site's queries lie on.

    Raises:
        Refusal: it is not known, or something ties the scores to more than the map.
    """
    if site.queries is not None and len(site.queries) < site.source_tokens:
        raise Refusal(
            f"only {len(site.queries)} of its {site.source_tokens} tokens query: it is a readout (class attention); "
            "there is no token mixing to replace"
        )
    if site.queries is not None:
        raise Refusal("its queries are not in the order of the tokens of their map")
    if isinstance(site.keys, Interleaved):
        raise Refusal(
            f"it attends within {site.keys} groups, which spread over the map",
            "to='neighborhood' and to='long_short_distance' keep them",
        )
    if not isinstance(site.keys, Global | Reduced):
        raise Refusal(f"its queries see {site.keys}, which do not lie on a map")
    if site.grid is None:
        raise Refusal("the positions of its tokens on the map are unknown")
    if site.mask is not None:
        raise Refusal("a constant mask acts on its scores")
    return site.grid


def bias_entries(site: AttentionSite, grid: Grid) -> Tensor | None:
    """Where a dense bias holds its relative table; a bias that is not relative cannot follow other keys."""
    if site.bias is None:
        return None
    table = None if grid.prefix_tokens else relative_table(site.bias.values, (grid.height, grid.width))
    if table is None:
        raise Refusal("its bias is not a function of relative position on the map alone")
    return table[1]


def window_bias_entries(site: AttentionSite, groups: MapGroups) -> Tensor | None:
    """Where the bias of windows, or of other groups, holds its relative table."""
    if site.bias is None:
        return None
    table = relative_table(site.bias.values, groups.size)
    if table is None:
        where = "window" if isinstance(groups, Window) else "group"
        raise Refusal(f"its bias is not a function of relative position in the {where}")
    return table[1]


def relative_bias(site: AttentionSite, kernel: Pair, dilation: Pair = (1, 1)) -> Tensor | None:
    """``[heads, 2k-1, 2k-1]`` in key-minus-query order: the part of a site's own table that a kernel reaches."""
    if site.bias is None:
        return None
    if isinstance(site.keys, Window):
        entries, sides = window_bias_entries(site, site.keys), site.keys.size
    else:
        grid = grid_of_site(site)
        entries, sides = bias_entries(site, grid), (grid.height, grid.width)
    assert entries is not None
    return reached_table(site.bias.values, entries, sides, kernel, dilation)


def is_whole_map(site: AttentionSite) -> bool:
    """Whether a windowed site's one window is the map: then it is global attention with a table."""
    window = site.keys
    return isinstance(window, Window) and window.size == (site.map_grid.height, site.map_grid.width)


def require_positive(name: str, value: Any) -> None:
    """Raises:
    ArgumentError: ``value`` is no positive integer, nor two of them.
    """
    values = value if isinstance(value, tuple | list) and len(value) == 2 else (value,)
    if any(type(each) is not int for each in values):
        raise ArgumentError(f"{name}: expected an integer or two of them, got {value!r}")
    if min(values) < 1:
        raise ArgumentError(f"{name}: must be at least 1, got {as_pair(value)}")


def require_one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raises:
    ArgumentError: ``value`` is none of the ``known``.
    """
    if value not in known:
        raise ArgumentError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")


def text_of(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
