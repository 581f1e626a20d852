"""The papers' attentions as dense attention: explicit masks, biases and pooling matrices, from their definitions.

Nothing here calls the library. Tokens of a map are in row-major order, after the prefix tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """What one attention of a donor computes from: projections ``[batch, tokens, heads, dim]`` and where tokens lie.

    ``table`` ``[heads, 2m-1, 2m-1]`` is a window's bias by key minus query; ``reduced`` is the map of the keys where
    they are fewer than the queries, and then ``own_key`` and ``own_value`` are the tokens' own projections and
    ``tokens`` ``[batch, tokens, channels]`` what they are projected from.
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    sides: tuple[int, int]
    prefix: int = 0
    table: Tensor | None = None
    window: tuple[int, int] | None = None
    shifted: bool = False
    reduced: tuple[int, int] | None = None
    own_key: Tensor | None = None
    own_value: Tensor | None = None
    tokens: Tensor | None = None


def mixed_by(scores: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)


def scores_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.einsum("bnhd,bmhd->bhnm", query, key) * scale


def dense(op: Operands, added: Tensor | float = 0.0) -> Tensor:
    return mixed_by(scores_of(op.query, op.key, op.scale) + added, op.value)


def places(sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of every token of a map."""
    rows, columns = torch.meshgrid(torch.arange(sides[0]), torch.arange(sides[1]), indexing="ij")
    return rows.flatten(), columns.flatten()


def offsets(sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns from every query to every key, ``[tokens, tokens]``."""
    rows, columns = places(sides)
    return rows[None] - rows[:, None], columns[None] - columns[:, None]


def after_prefix(of_map: Tensor, prefix: int, fill: float | bool) -> Tensor:
    """``[..., tokens, tokens]`` of a map, with ``fill`` to and from the prefix tokens."""
    return F.pad(of_map, (prefix, 0, prefix, 0), value=fill)


def masked(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)


def table_at(table: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """The table's value at every offset; offsets beyond it take that of its edge."""
    reach = (table.shape[1] // 2, table.shape[2] // 2)
    return table[:, down.clamp(-reach[0], reach[0]) + reach[0], across.clamp(-reach[1], reach[1]) + reach[1]]


def axis_neighbors(side: int, kernel: int, dilation: int) -> Tensor:
    """Hassani and Shi 2022: the ``kernel`` nearest places of the query's residue, sliding inward at the ends."""
    kernel = max(1, min(kernel, side // dilation))
    seen = torch.zeros(side, side, dtype=torch.bool)
    for query in range(side):
        alike = range(query % dilation, side, dilation)
        start = min(max(query // dilation - kernel // 2, 0), len(alike) - kernel)
        seen[query, list(alike)[start : start + kernel]] = True
    return seen


def on_both_axes(rows: Tensor, columns: Tensor) -> Tensor:
    """``[tokens, tokens]`` from what each axis allows."""
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def neighbors(op: Operands, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> Tensor:
    axes = [axis_neighbors(*axis) for axis in zip(op.sides, kernel, dilation, strict=True)]
    return after_prefix(on_both_axes(*axes), op.prefix, True)


def neighborhood(op: Operands, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> Tensor:
    bias = 0.0 if op.table is None else table_at(op.table, *offsets(op.sides))
    return dense(op, masked(neighbors(op, kernel, dilation)) + bias)


def reduced_neighbors(op: Operands, kernel: tuple[int, int]) -> Tensor:
    """``[tokens, cells]``: the ``kernel`` cells nearest to the one above each token."""
    assert op.reduced is not None
    axes = []
    for side, cells, size in zip(op.sides, op.reduced, kernel, strict=True):
        above = [place * cells // side for place in range(side)]
        axes.append(axis_neighbors(cells, size, 1)[above])
    return on_both_axes(*axes)


def reduced_neighborhood(op: Operands, kernel: tuple[int, int]) -> Tensor:
    return dense(op, masked(reduced_neighbors(op, kernel)))


def axis_group(side: int, group: int, interval: int) -> Tensor:
    """Wang et al. 2022: ``[side]``, which group each place of an axis is in."""
    group, interval = (min(group, side), interval if group < side else 1)
    place = torch.arange(side)
    return place // (group * interval) * interval + place % interval


def grouped(op: Operands, group: tuple[int, int], interval: tuple[int, int]) -> Tensor:
    axes = [axis_group(*axis) for axis in zip(op.sides, group, interval, strict=True)]
    seen = on_both_axes(*(axis[:, None] == axis[None] for axis in axes))
    return after_prefix(seen, op.prefix, True)


def long_short_distance(op: Operands, group: tuple[int, int], interval: tuple[int, int]) -> Tensor:
    bias: Tensor | float = 0.0
    if op.table is not None:  # the table counts places of a group, which lie an interval apart
        steps = zip(offsets(op.sides), interval, strict=True)
        bias = table_at(op.table, *(torch.div(offset, i, rounding_mode="trunc") for offset, i in steps))
    return dense(op, masked(grouped(op, group, interval)) + bias)


def manhattan_distance(op: Operands) -> Tensor:
    down, across = offsets(op.sides)
    return after_prefix((down.abs() + across.abs()).double(), op.prefix, 0.0)


def manhattan(op: Operands, decay: Tensor, placement: str = "inside") -> Tensor:
    """Fan et al. 2024; ``decay`` ``[heads]``, a step."""
    exponent = decay.log()[:, None, None] * manhattan_distance(op)
    bias: Tensor | float = 0.0
    if op.table is not None:
        bias = table_at(op.table, *offsets(op.sides))
    if placement == "inside":
        return dense(op, exponent + bias)
    weights = (scores_of(op.query, op.key, op.scale) + bias).softmax(-1) * exponent.exp()
    return torch.einsum("bhnm,bmhd->bnhd", weights, op.value)


def decomposed_manhattan(op: Operands, decay: Tensor) -> Tensor:
    """Along rows, then along columns, each a masked dense attention of the map; prefix tokens see everything."""
    rows, columns = places(op.sides)
    of_map = replace(op, **{part: getattr(op, part)[:, op.prefix :] for part in ("query", "key", "value")})
    for line in (rows, columns):
        same = line[:, None] == line[None]
        decayed = decay.log()[:, None, None] * manhattan_distance(replace(op, prefix=0))
        of_map = replace(of_map, value=dense(of_map, masked(same) + decayed))
    return torch.cat([dense(op)[:, : op.prefix], of_map.value], dim=1)


def reduced_manhattan(op: Operands, decay: Tensor) -> Tensor:
    """Decay by the distance to the center of each reduced key's cell, in tokens of the queries' map."""
    assert op.reduced is not None
    axes = []
    for side, cells in zip(op.sides, op.reduced, strict=True):
        width = side / cells
        centers = torch.tensor([(cell + 0.5) * width - 0.5 for cell in range(cells)], dtype=torch.float64)
        axes.append((torch.arange(side)[:, None] - centers[None]).abs())
    distance = (axes[0][:, None, :, None] + axes[1][None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return dense(op, decay.log()[:, None, None] * distance)


def local_context(op: Operands, weight: Tensor, bias: Tensor) -> Tensor:
    """RMT's local context enhancement: a depthwise convolution of the map of all heads' values."""
    batch, _, heads, dim = op.value.shape
    image = op.value[:, op.prefix :].reshape(batch, *op.sides, heads * dim).permute(0, 3, 1, 2)
    local = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=heads * dim)
    return F.pad(local.permute(0, 2, 3, 1).reshape(batch, -1, heads, dim), (0, 0, 0, 0, op.prefix, 0))


@dataclass(frozen=True)
class LocalWeights:
    """What aggregated attention learns for a window: see Shi 2024, section 3; ``bias`` None is no window in the
    softmax."""

    embedding: Tensor
    tokens: Tensor
    token_bias: Tensor
    bias: Tensor | None


def pooling_matrix(sides: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """``[cells, tokens]`` of adaptive average pooling."""
    count = sides[0] * sides[1]
    return F.adaptive_avg_pool2d(torch.eye(count, dtype=torch.float64).view(count, 1, *sides), cells).flatten(1).T


def aggregated(op: Operands, window_size: int, pool: tuple[int, int], local: LocalWeights) -> Tensor:
    """One softmax over each token's window, the prefix and the pooled map; then the learned weights."""
    cells = (max(1, op.sides[0] // pool[0]), max(1, op.sides[1] // pool[1]))
    pooling = pooling_matrix(op.sides, cells)
    own, shared = op.prefix, {}
    for part in ("key", "value"):
        whole = getattr(op, part)
        shared[part] = torch.cat([whole[:, :own], torch.einsum("cn,bnhd->bchd", pooling, whole[:, own:])], dim=1)
    added = F.pad((pooling > 0).sum(1).double().log(), (own, 0)).expand(op.sides[0] * op.sides[1], -1)
    if op.table is not None and cells == op.sides == op.window:
        added = table_at(op.table, *offsets(op.sides))
    of_map = replace(op, **{part: getattr(op, part)[:, own:] for part in ("query", "key", "value")}, prefix=0)
    image = with_window(of_map, window_size, local, shared["key"], shared["value"], added)
    return torch.cat([dense(op)[:, :own], image], dim=1)


def reduced_aggregated(op: Operands, window_size: int, local: LocalWeights) -> Tensor:
    """One softmax over each token's window and the donor's reduced keys."""
    assert op.own_key is not None
    assert op.own_value is not None
    of_map = replace(op, key=op.own_key, value=op.own_value)
    return with_window(of_map, window_size, local, op.key, op.value, torch.zeros(1, dtype=torch.float64))


def with_window(
    op: Operands, size: int, local: LocalWeights, shared_key: Tensor, shared_value: Tensor, shared_bias: Tensor
) -> Tensor:
    inside, place, by_tokens = window_places(op, size, local)
    embedded = op.query + local.embedding[:, 0]
    shared = scores_of(embedded, shared_key, op.scale) + shared_bias
    if local.bias is None:
        return by_tokens + mixed_by(shared, shared_value)
    bias = local.bias[:, place] + (0.0 if op.table is None else table_at(op.table, *offsets(op.sides)))
    near = scores_of(embedded, op.key, op.scale) + bias + masked(inside)
    return by_tokens + mixed_by(torch.cat([near, shared], dim=-1), torch.cat([op.value, shared_value], dim=1))


def window_places(op: Operands, size: int, local: LocalWeights) -> tuple[Tensor, Tensor, Tensor]:
    """``[queries, keys]`` whether a key is in the window and at which place, and what the learned weights mix."""
    down, across = offsets(op.sides)
    inside = (down.abs() <= size // 2) & (across.abs() <= size // 2)
    place = ((down + size // 2) * size + across + size // 2).clamp(0, size**2 - 1)
    learned = torch.einsum("bnhd,hdp->bhnp", op.query, local.tokens) + local.token_bias[:, 0][None, :, None]
    learned = learned.gather(-1, place.expand(*learned.shape[:2], -1, -1)) * inside
    return inside, place, torch.einsum("bhnm,bmhd->bnhd", learned, op.value)


def masked_windows(op: Operands, local: LocalWeights) -> Tensor:
    """Liu et al. 2021: attention inside (shifted) windows, with what aggregated attention learns for 2 M - 1 places."""
    assert op.window is not None
    assert op.table is not None
    assert local.bias is not None
    _, place, by_tokens = window_places(op, 2 * max(op.window) - 1, local)
    blocks = []
    for side, size in zip(op.sides, op.window, strict=True):
        shift = size // 2 if op.shifted else 0
        blocks.append((torch.arange(side) + size - shift) // size)
    seen = on_both_axes(*(block[:, None] == block[None] for block in blocks))
    bias = table_at(op.table, *offsets(op.sides)) + local.bias[:, place]
    scores = scores_of(op.query + local.embedding[:, 0], op.key, op.scale)
    return by_tokens + mixed_by(scores + bias + masked(seen), op.value)
