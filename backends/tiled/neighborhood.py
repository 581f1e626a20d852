"""The blocks of neighborhood attention: halo tiles, where a tile of queries attends to the box of keys its windows
touch.

Tiles whose windows lie alike (all interior ones, say) form one block with one mask. Windows that slide inward at a
border, stride, causality and dilation only make for other masks or further blocks. A tile may be as long as the map
along an axis (a band) or along all (dense attention): the cost model decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, groupby, product, takewhile
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...operators.index_rule import AxisRule, windows
from .blocks import Block
from .cost import Work, seconds
from .logit_terms import ABSENT, FIRST_BIAS, FREE, over_axes, row_major
from .tiles import AxisTiles


@dataclass(frozen=True)
class AxisSpan:
    """Tiles along an axis whose windows lie alike: query i sees the keys ``range(*windows[i])`` of its tile."""

    queries: AxisTiles
    keys: AxisTiles
    windows: tuple[tuple[int, int], ...]


@lru_cache(maxsize=1024)
def axis_spans(rule: AxisRule, tile: int) -> tuple[AxisSpan, ...]:
    """Cut each dilation group of an axis into tiles of ``tile`` queries; runs of alike tiles are one span."""
    return tuple(
        span
        for first_group, groups, length in _group_classes(rule)
        for span in _group_spans(rule, tile, first_group, groups, length)
    )


def _group_classes(rule: AxisRule) -> Iterator[tuple[int, int, int]]:
    """(first group, groups, length): if the dilation does not divide an axis, the first groups are longer."""
    length, longer = divmod(rule.length, rule.dilation)
    if longer:
        yield 0, longer, length + 1
    yield longer, rule.dilation - longer, length


def _group_spans(rule: AxisRule, tile: int, first_group: int, groups: int, length: int) -> Iterator[AxisSpan]:
    undilated = windows(replace(rule, length=length, dilation=1))
    layouts = [(start, _layout(undilated[start : start + tile], start)) for start in range(0, length, tile)]
    for (offset, keys, relative), alike in groupby(layouts, key=lambda item: item[1]):
        starts = [start for start, _ in alike]
        common = (tile, len(starts), first_group, groups, rule.dilation)
        yield AxisSpan(
            AxisTiles(starts[0], len(relative), *common),
            AxisTiles(starts[0] + offset, keys, *common),
            relative,
        )


def _layout(tile: Sequence[range], start: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Where a tile's keys begin relative to its queries, how many they are, and its windows inside them."""
    first, stop = min(window.start for window in tile), max(window.stop for window in tile)
    return first - start, stop - first, tuple((window.start - first, window.stop - first) for window in tile)


@lru_cache(maxsize=128)
def neighborhood_blocks(
    rules: tuple[AxisRule, ...], tile: tuple[int, ...], has_bias: bool, extras: int, device: torch.device
) -> tuple[Block, ...]:
    """The blocks of a neighborhood, with ``tile`` queries a tile along each axis and ``extras`` extra keys."""
    spans = (axis_spans(rule, size) for rule, size in zip(rules, tile, strict=True))
    return tuple(_block(axes, rules, has_bias, extras, device) for axes in product(*spans))


@lru_cache(maxsize=1024)
def cheapest_tile(rules: tuple[AxisRule, ...], work: Work) -> tuple[tuple[int, ...], float]:
    """Queries per tile along each axis, and the modelled seconds."""

    def modelled(tile: tuple[int, ...]) -> float:
        spans = [axis_spans(rule, size) for rule, size in zip(rules, tile, strict=True)]
        return seconds(work, *(prod(map(number, spans)) for number in (_pairs, _keys, _tiles, len)))

    best = min(product(*map(_candidates, rules)), key=modelled)
    return best, modelled(best)


def _candidates(rule: AxisRule) -> list[int]:
    """Multiples of the stride, in steps of about sqrt(2), that cut the longest dilation group evenly."""
    length = max(1, -(-rule.length // rule.dilation))
    targets = takewhile(lambda size: size < length, (4 * 2 ** (step / 2) for step in count()))
    even = {-(-length // round(length / target)) for target in targets} | {length}
    return sorted({min(-(-size // rule.stride) * rule.stride, length) for size in even})


def _pairs(spans: tuple[AxisSpan, ...]) -> int:
    return sum(s.queries.groups * s.queries.count * s.queries.size * s.keys.size for s in spans)


def _keys(spans: tuple[AxisSpan, ...]) -> int:
    return sum(s.keys.groups * s.keys.count * s.keys.size for s in spans)


def _tiles(spans: tuple[AxisSpan, ...]) -> int:
    return sum(s.queries.groups * s.queries.count for s in spans)


def _block(
    axes: tuple[AxisSpan, ...], rules: tuple[AxisRule, ...], has_bias: bool, extras: int, device: torch.device
) -> Block:
    queries, keys = tuple(span.queries for span in axes), tuple(span.keys for span in axes)
    inside, entries = zip(*map(_axis_terms, axes, rules), strict=True)
    seen = over_axes(inside, torch.logical_and)
    if not has_bias and seen.all():
        return Block(queries, keys, None, extras)
    entry = row_major(entries, [rule.bias_length for rule in rules])
    terms = torch.where(seen, FIRST_BIAS + entry if has_bias else FREE, ABSENT)
    terms = pad(terms, (0, extras), value=FREE)
    return Block(queries, keys, terms.to(device), extras)


def _axis_terms(span: AxisSpan, rule: AxisRule) -> tuple[Tensor, Tensor]:
    """Per query and key of a tile: is the key in the window, and its entry of the relative position bias."""
    first, stop = torch.tensor(span.windows).unsqueeze(-1).unbind(1)
    key, query = torch.arange(span.keys.size), torch.arange(span.queries.size)[:, None]
    offset = span.keys.start - span.queries.start
    return (key >= first) & (key < stop), key + offset - query + rule.bias_reach
