"""Local attention by its definition: every query's keys gathered, in float64, with torch's own derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from attnrewrite.operators.index_rule import AxisRule

OPERANDS = ("query", "key", "value", "bias", "extra_key", "extra_value", "extra_bias", "place_bias", "post")


@dataclass(frozen=True)
class Local:
    """What the native operator takes, beside its scale."""

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    slides: bool
    scale: float = 0.4


def attention(operands: dict[str, Tensor | None], local: Local) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of operands in float64."""
    query, key, value, bias, extra_key, extra_value, extra_bias, place_bias, post = map(operands.get, OPERANDS)
    keys, valid, entries = seen(tuple(query.shape[1:-2]), local)
    own = query.flatten(1, -3)
    gathered = [torch.where(valid[:, :, None, None], each.flatten(1, -3)[:, keys], 0.0) for each in (key, value)]
    logits = torch.einsum("bnhd,bnphd->bnhp", own, gathered[0]) * local.scale
    if bias is not None:
        logits = logits + bias.flatten(1)[:, entries].transpose(0, 1)
    if place_bias is not None:
        logits = logits + place_bias.flatten(1, -2).transpose(0, 1)
    logits = logits.masked_fill(~valid[:, None], -torch.inf)
    if extra_key is not None:
        shared = torch.einsum("bnhd,bahd->bnha", own, extra_key) * local.scale
        if extra_bias is not None:
            shared = shared + extra_bias.flatten(1, -2).transpose(0, 1)
        logits = torch.cat([logits, shared], dim=-1)
    weights, places = logits.softmax(-1), valid.shape[1]
    in_window = weights[..., :places]
    if post is not None:
        in_window = in_window + post.flatten(1, -3).masked_fill(~valid[:, None], 0.0)
    output = torch.einsum("bnhp,bnphd->bnhd", in_window, gathered[1])
    if extra_value is not None:
        output = output + torch.einsum("bnha,bahd->bnhd", weights[..., places:], extra_value)
    shape = query.shape[:-1]
    return output.reshape(*shape, value.shape[-1]), logits.logsumexp(-1).reshape(shape)


def seen(grid: tuple[int, ...], local: Local) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of every query, which of them are on the map, and the entries of the bias, ``[queries, places]`` each."""
    axes = [_axis(*axis, local.slides) for axis in zip(grid, local.kernel_size, local.dilation, strict=True)]
    tables = [2 * size - 1 if local.slides else size for size in local.kernel_size]
    keys, valid, entries = zip(*axes, strict=True)
    return _joined(keys, grid), reduce(lambda a, b: _outer(a, b, torch.logical_and), valid), _joined(entries, tables)


def _axis(length: int, size: int, dilation: int, slides: bool) -> tuple[Tensor, Tensor, Tensor]:
    queries = torch.arange(length)[:, None]
    if slides:
        rule = AxisRule(length, size, dilation=dilation)
        keys = torch.tensor([list(rule.window(query)) for query in range(length)]).reshape(length, size)
        return keys, torch.ones_like(keys, dtype=torch.bool), (keys - queries) // dilation + size - 1
    places = torch.arange(size).expand(length, -1)
    keys = queries + (places - size // 2) * dilation
    valid = (keys >= 0) & (keys < length)
    return torch.where(valid, keys, 0), valid, places


def _outer(one: Tensor, other: Tensor, join) -> Tensor:
    return join(one[:, None, :, None], other[None, :, None, :]).flatten(2).flatten(0, 1)


def _joined(parts, sizes) -> Tensor:
    weighted = [part * prod(sizes[axis + 1 :]) for axis, part in enumerate(parts)]
    return reduce(lambda a, b: _outer(a, b, torch.add), weighted)
