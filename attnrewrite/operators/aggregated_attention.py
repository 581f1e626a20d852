"""Aggregated attention (Shi 2024, TransNeXt, sections 3.1 and 3.2): a window and shared keys in one softmax.

Every query of a map attends to the window around it, cut off at the border of the map, and to keys that all queries
share (a pooled map, class tokens). Affinities of the query to learned tokens may add to the window's weights after the
softmax:

    output = (softmax([query . key of the window + bias, query . shared key + bias])
              + [plain query . learned token + learned bias, 0]) [values of the window, shared values]

Pixel-focused attention (section 3.1) has no learned tokens. It is a call of the operator ``local_attention``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .index_rule import MASK
from .local_attention import LOCAL_ATTENTION, LocalProblem


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

    Raises:
        ArgumentError: for a window without a center, no keys at all, or learned tokens without a window.
    """
    _check(problem)
    query, local, shared = problem.query, problem.local, problem.shared
    heads, pixels = query.shape[-2], tuple(query.shape[1:3])
    bias = None if shared is None or shared.bias is None else shared.bias.expand(heads, *pixels, -1)
    if local is None:
        assert shared is not None
        return _dense(query, shared.key, shared.value, bias, problem.dropout)
    side = (local.window_size, local.window_size)
    call = LocalProblem(
        query, local.key, local.value, _window_bias(local, query), None if shared is None else shared.key,
        None if shared is None else shared.value, bias,
        _mask(local, query), _affinity(problem.learned, local), side, (1, 1), (1, 1), (0, 0), (False, False), MASK, 1.0,
    )  # fmt: skip
    return call.plain(problem.dropout)[0] if problem.dropout else LOCAL_ATTENTION(call)[0]


def _dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Of a map's queries and nothing but shared keys."""
    queries, keys, values = (part.transpose(1, 2) for part in (query.flatten(1, 2), key, value))
    mask = None if bias is None else bias.flatten(1, 2)[None].to(query.dtype)
    mixed = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=1.0)
    return mixed.transpose(1, 2).unflatten(1, query.shape[1:3])


def _window_bias(local: LocalKeys, query: Tensor) -> Tensor | None:
    """``[heads, window_size, window_size]``; minus infinity leaves a window out of the softmax."""
    bias = local.bias
    if not local.in_softmax:
        bias = query.new_full((query.shape[-2], local.window_size**2), -torch.inf)
    return None if bias is None else bias.unflatten(1, (local.window_size, local.window_size))


def _mask(local: LocalKeys, query: Tensor) -> Tensor | None:
    """``[heads, H, W, places]`` of the places that are seen: zero, and minus infinity at others."""
    if local.seen is None:
        return None
    hidden = torch.zeros(local.seen.shape, dtype=query.dtype, device=query.device).masked_fill(~local.seen, -torch.inf)
    return hidden.unflatten(0, query.shape[1:3]).expand(query.shape[-2], -1, -1, -1)


def _affinity(learned: LearnedTokens | None, local: LocalKeys) -> Tensor | None:
    """``[B, H, W, heads, places]``: what learned tokens add to the weights of the window."""
    if learned is None:
        return None
    affinity = torch.einsum("byxhd,hdp->byxhp", learned.query, learned.tokens) + learned.bias.squeeze(1)
    if learned.follows_mask and local.seen is not None:
        seen = local.seen.unflatten(0, affinity.shape[1:3])
        return affinity.masked_fill(~seen[:, :, None], 0.0)
    return affinity


def _check(problem: AggregatedProblem) -> None:
    local, shared = problem.local, problem.shared
    if local is not None and (local.window_size < 1 or local.window_size % 2 == 0):
        raise ArgumentError(f"window_size: must be odd, so that the window has a center, got {local.window_size}")
    if shared is None and (local is None or not local.in_softmax):
        raise ArgumentError("local, shared: there is no key in the softmax; pass shared keys or a window in it")
    if problem.learned is not None and local is None:
        raise ArgumentError("learned: tokens weigh the values of a window; pass local keys")
