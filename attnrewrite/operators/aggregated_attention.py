"""Aggregated attention (Shi 2024, TransNeXt, sections 3.1 and 3.2): a window and shared keys in one softmax.

Every query of a map attends to the window around it, cut off at the border of the map, and to keys that all queries
share (a pooled map, class tokens). Affinities of the query to learned tokens may add to the window's weights after the
softmax:

    output = (softmax([query . key of the window + bias, query . shared key + bias])
              + [plain query . learned token + learned bias, 0]) [values of the window, shared values]

Pixel-focused attention (section 3.1) has no learned tokens. The function here is the meaning: plain torch operations,
for any device, layout and floating dtype, of any order of differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .local_window import inside_map, window_average, window_scores


@dataclass(frozen=True)
class LocalKeys:
    """The window around every query.

    Attributes:
        key, value: ``[B, H, W, heads, head_dim]`` and ``[B, H, W, heads, value_dim]`` of the queries' map.
        window_size: side of the window in tokens, odd; it may exceed the map. Its ``window_size ** 2`` places are in
            row-major order.
        bias: ``[heads, window_size ** 2]``, added to the scores.
        seen: ``[H * W, window_size ** 2]``, bool: which places on the map are in the softmax; None is all of them.
        in_softmax: False leaves the window out of the softmax: only the learned tokens weigh its values.
    """

    key: Tensor
    value: Tensor
    window_size: int
    bias: Tensor | None = None
    seen: Tensor | None = None
    in_softmax: bool = True


@dataclass(frozen=True)
class SharedKeys:
    """Keys that every query sees.

    Attributes:
        key, value: ``[B, keys, heads, head_dim]`` and ``[B, keys, heads, value_dim]``.
        bias: ``[keys]`` or ``[heads, H, W, keys]``, added to the scores.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LearnedTokens:
    """What adds to the window's weights after the softmax.

    Attributes:
        query: ``[B, H, W, heads, head_dim]``, neither scaled nor embedded.
        tokens: ``[heads, head_dim, window_size ** 2]``.
        bias: ``[heads, 1, window_size ** 2]``.
        follows_mask: whether places that ``LocalKeys.seen`` leaves out of the softmax have no weight here either.
    """

    query: Tensor
    tokens: Tensor
    bias: Tensor
    follows_mask: bool = False


@dataclass(frozen=True)
class AggregatedGeometry:
    """The sizes of a problem, per image. Whole numbers, or symbols of them where a cost is wanted as a formula.

    Attributes:
        height, width: of the map, in tokens.
        heads, head_dim, value_dim: channels of queries and keys, and of values, per head.
        window_size: side of the window in tokens; 0 is no window.
        shared_keys: keys that every query sees.
        in_softmax, learned: whether the window is in the softmax, and whether learned tokens weigh its values.
    """

    height: int
    width: int
    heads: int
    head_dim: int
    value_dim: int
    window_size: int = 0
    shared_keys: int = 0
    in_softmax: bool = True
    learned: bool = False

    def macs(self) -> int:
        """Multiply-accumulates of one image: scores, learned affinities and averages, without softmax and bias."""
        affinities = self.head_dim * (int(self.in_softmax) + int(self.learned))
        window = self.window_size**2 * (affinities + self.value_dim)
        shared = self.shared_keys * (self.head_dim + self.value_dim)
        return self.height * self.width * self.heads * (window + shared)


@dataclass(frozen=True)
class AggregatedProblem:
    """One call of aggregated attention.

    Attributes:
        query: ``[B, H, W, heads, head_dim]``, scaled and embedded: the scores are its products with the keys.
        local, shared, learned: at least one of the first two; learned tokens need a window.
        dropout: rate on the weights of the softmax.
    """

    query: Tensor
    local: LocalKeys | None = None
    shared: SharedKeys | None = None
    learned: LearnedTokens | None = None
    dropout: float = 0.0

    @property
    def geometry(self) -> AggregatedGeometry:
        """What a backend may choose by, and what the call costs."""
        _batch, height, width, heads, head_dim = self.query.shape
        keys = self.local or self.shared
        assert keys is not None
        return AggregatedGeometry(
            height, width, heads, head_dim, keys.value.shape[-1],
            window_size=0 if self.local is None else self.local.window_size,
            shared_keys=0 if self.shared is None else self.shared.key.shape[1],
            in_softmax=self.local is not None and self.local.in_softmax,
            learned=self.learned is not None,
        )  # fmt: skip


def aggregated_attention(problem: AggregatedProblem) -> Tensor:
    """``[B, H, W, heads, value_dim]``.

    Products are in the dtype of their operands, the softmax in the widest of the scores'.

    Raises:
        ArgumentError: for a window without a center, no keys at all, or learned tokens without a window.
    """
    _check(problem)
    local, shared, learned = problem.local, problem.shared, problem.learned
    pixels = (problem.query.shape[1], problem.query.shape[2])
    weights = _softmax(problem)
    mixed = None
    if local is not None:
        places = local.window_size**2 if local.in_softmax else 0
        in_window, weights = weights[..., :places], weights[..., places:]
        affinity = None if learned is None else _affinity(learned, local)
        if affinity is not None:
            in_window = in_window + affinity if places else affinity
        if places or affinity is not None:
            mixed = window_average(in_window.unflatten(2, pixels), _heads_first(local.value), local.window_size)
    if shared is not None:
        value = shared.value.transpose(1, 2)
        from_shared = (weights.to(value.dtype) @ value).unflatten(2, pixels)
        mixed = from_shared if mixed is None else mixed + from_shared
    assert mixed is not None
    return mixed.permute(0, 2, 3, 1, 4)


def _softmax(problem: AggregatedProblem) -> Tensor:
    """``[B, heads, H * W, keys]``: the weights of the window's places, if they are in it, then of the shared keys."""
    query, scores = _heads_first(problem.query), []
    if problem.local is not None and problem.local.in_softmax:
        scores.append(_local_scores(query, problem.local))
    if problem.shared is not None:
        scores.append(_shared_scores(query.flatten(2, 3), problem.shared))
    weights = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)).softmax(-1)
    return F.dropout(weights, problem.dropout) if problem.dropout else weights


def _local_scores(query: Tensor, local: LocalKeys) -> Tensor:
    """``[B, heads, H * W, places]`` of ``[B, heads, H, W, head_dim]``; minus infinity where a place is not in the
    softmax."""
    scores = window_scores(query, _heads_first(local.key), local.window_size).flatten(2, 3)
    if local.bias is not None:
        scores = scores + local.bias[:, None]
    seen, (height, width) = local.seen, query.shape[2:4]
    seen = inside_map(height, width, local.window_size, query.device) if seen is None else seen
    return scores.masked_fill(~seen, float("-inf"))


def _shared_scores(query: Tensor, shared: SharedKeys) -> Tensor:
    """``[B, heads, H * W, keys]`` of ``[B, heads, H * W, head_dim]``."""
    key = shared.key.transpose(1, 2)
    scores = query.to(key.dtype) @ key.transpose(-1, -2)
    if shared.bias is None:
        return scores
    return scores + (shared.bias if shared.bias.ndim == 1 else shared.bias.flatten(1, 2))


def _affinity(learned: LearnedTokens, local: LocalKeys) -> Tensor:
    """``[B, heads, H * W, places]`` of the learned tokens."""
    affinity = _heads_first(learned.query).flatten(2, 3) @ learned.tokens + learned.bias
    if learned.follows_mask and local.seen is not None:
        return affinity.masked_fill(~local.seen, 0.0)
    return affinity


def _heads_first(source: Tensor) -> Tensor:
    return source.permute(0, 3, 1, 2, 4)


def _check(problem: AggregatedProblem) -> None:
    local, shared = problem.local, problem.shared
    if local is not None and (local.window_size < 1 or local.window_size % 2 == 0):
        raise ArgumentError(f"window_size: must be odd, so that the window has a center, got {local.window_size}")
    if shared is None and (local is None or not local.in_softmax):
        raise ArgumentError("local, shared: there is no key in the softmax; pass shared keys or a window in it")
    if problem.learned is not None and local is None:
        raise ArgumentError("learned: tokens weigh the values of a window; pass local keys")
