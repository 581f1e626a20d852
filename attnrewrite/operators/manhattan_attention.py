"""Manhattan attention (MaSA of RMT; Fan et al., CVPR 2024, section 3): weights decay with the distance on the map.

Full form: every token attends to the whole map, with ``log_decay * (|rows apart| + |columns apart|)`` added to the
scores (``inside``, as in all released code), or with the weights multiplied by its exponential after the softmax
(``outside``, the paper's equation). Decomposed form: attention along rows, then, with the same queries and keys, along
columns to what the rows gave.

The function here is the meaning: plain torch operations, for any device, layout and floating dtype, of any order of
differentiation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, nearest

PLACEMENTS = ("inside", "outside")
CODE_ALIGNMENT = 8
"""Fused attention wants channels in multiples of this (16 bytes of half precision)."""


@dataclass(frozen=True)
class ManhattanGeometry:
    """What of a call is no tensor.

    Attributes:
        height, width: of the queries' map, in tokens.
        prefix_tokens: tokens before those of the map (class, register): they see and are seen without decay.
        keys: rows and columns of a coarser map that the keys are cells of, whose centers distances are measured to;
            None: the keys are the queries' own tokens.
        decomposed: along rows, then along columns.
        placement: of the decay, ``"inside"`` or ``"outside"`` the softmax.
        scale: of the dot products; None is ``head_dim ** -0.5``.
        dropout: rate on the attention weights; only with the decay inside, and not decomposed.
        by_codes: write distances as inner products of position codes (``map_code``), which are appended to queries and
            keys, so that nothing of tokens by tokens is built, forward or backward, where fused attention takes over.
            It is the same function and pays on large maps; it has no meaning for the other forms and is ignored there.
    """

    height: int
    width: int
    prefix_tokens: int = 0
    keys: tuple[int, int] | None = None
    decomposed: bool = False
    placement: str = "inside"
    scale: float | None = None
    dropout: float = 0.0
    by_codes: bool = False

    def macs(self, heads: int, head_dim: int, value_dim: int) -> int:
        """Multiply-accumulates of one image, by definition (position codes do not count).

        Arguments and sizes may be symbols of whole numbers, where a cost is wanted as a formula.
        """
        cells = self.height * self.width
        if self.decomposed:
            pairs = cells * (self.height + self.width)
        else:
            tokens = cells + self.prefix_tokens
            pairs = tokens * (tokens if self.keys is None else self.keys[0] * self.keys[1])
        return heads * pairs * (head_dim + value_dim)


def manhattan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    geometry: ManhattanGeometry,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend.

    Args:
        query: ``[B, prefix_tokens + H * W, heads, head_dim]``, tokens of the map in raster order; without prefix tokens
            also as a map, ``[B, H, W, heads, head_dim]``.
        key, value: the same (values may have channels of their own), or ``[B, keys, heads, ...]`` of ``geometry.keys``.
        log_decay: ``[heads]``, natural logarithm of each head's decay a step, at most 0; in float32 or float64.
        geometry: sizes and form.
        bias: broadcasts to ``[B, heads, queries, keys]``, added to the scores of the full form.

    Returns:
        A tensor like ``query``, with the channels of ``value``.

    Raises:
        ArgumentError: for arguments that do not fit each other.
    """
    _check(query, key, value, log_decay, geometry, bias)
    scale = query.shape[-1] ** -0.5 if geometry.scale is None else geometry.scale
    sides, on_map = (geometry.height, geometry.width), query.ndim == 5
    if geometry.decomposed:
        parts = (query, key, value) if on_map else [part.unflatten(1, sides) for part in (query, key, value)]
        mixed = _along_axes(parts[0], parts[1], parts[2], log_decay, geometry.placement == "inside", scale)
        return mixed if on_map else mixed.flatten(1, 2)
    query, key, value = (part.flatten(1, -3).transpose(1, 2) for part in (query, key, value))
    mixed = _over_the_map(query, key, value, log_decay, geometry, bias, scale).transpose(1, 2)
    return mixed.unflatten(1, sides) if on_map else mixed


def axis_bias(log_decay: Tensor, length: int, cells: int | None = None) -> Tensor:
    """``[heads, length, length]``: the decay's logarithm times the distance along one axis; with ``cells``, the
    distance of every place to the center of every one of so many cells, ``[heads, length, cells]``."""
    place = torch.arange(length, device=log_decay.device)
    if cells is None or cells == length:
        return log_decay[:, None, None] * (place[:, None] - place).abs()
    center = (torch.arange(cells, device=log_decay.device, dtype=log_decay.dtype) + 0.5) * (length / cells) - 0.5
    return log_decay[:, None, None] * (place[:, None] - center).abs()


def map_bias(log_decay: Tensor, height: int, width: int, cells: tuple[int, int] | None = None) -> Tensor:
    """``[heads, H * W, H * W]``, or ``[heads, H * W, cells]``: the decay's logarithm times the Manhattan distance."""
    rows, columns = (
        axis_bias(log_decay, side, count) for side, count in zip((height, width), cells or (None, None), strict=True)
    )
    return (rows[:, :, None, :, None] + columns[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)


def map_code(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[H * W, code]`` of ±1 whose inner products tell Manhattan distances.

    A place ``p`` of an axis is written in unary: entry ``t`` is 1 where ``p > t``, else -1. Two places differ in as
    many entries as there are steps between them, hence ``<code(p), code(p')> = code - 2 * (|y - y'| + |x - x'|)``.
    """
    rows, columns = (_axis_code(length, dtype, device) for length in (height, width))
    return torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1).flatten(0, 1)


def with_prefix(bias: Tensor, prefix: int) -> Tensor:
    """``[heads, tokens, tokens]`` of a map's bias, zero to and from the prefix tokens."""
    return F.pad(bias, (prefix, 0, prefix, 0)) if prefix else bias


def check_placement(placement: str, argument: str) -> None:
    """Raises:
    ArgumentError: there is no such placement of the decay.
    """
    if placement not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise ArgumentError(f"{argument}: must be one of {known}, got {placement!r}{nearest(placement, PLACEMENTS)}")


def _over_the_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    geometry: ManhattanGeometry,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The full form; operands ``[B, heads, tokens, dim]``."""
    if geometry.by_codes and geometry.placement == "inside":
        return _with_codes(query, key, value, log_decay, geometry, scale)
    decay = map_bias(log_decay, geometry.height, geometry.width, geometry.keys)
    decay = with_prefix(decay, geometry.prefix_tokens)[None]
    if geometry.placement == "outside":
        return _decayed_weights(query, key, value, decay, bias, scale)
    added = (decay if bias is None else decay + bias).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, added, geometry.dropout, scale=scale)


def _along_axes(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, inside: bool, scale: float) -> Tensor:
    """The decomposed form, of a map ``[B, H, W, heads, dim]``."""
    value = _along_rows(query, key, value, log_decay, inside, scale)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return _along_rows(query, key, value, log_decay, inside, scale).transpose(1, 2)


def _along_rows(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, inside: bool, scale: float) -> Tensor:
    """Every token of a map ``[B, H, W, heads, dim]`` attends to its row."""
    batch, height, width = query.shape[:3]
    query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
    bias = axis_bias(log_decay, width)[None]
    if inside:
        mixed = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), scale=scale)
    else:
        mixed = _decayed_weights(query, key, value, bias, None, scale)
    return mixed.transpose(1, 2).unflatten(0, (batch, height))


def _decayed_weights(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """The decay after the softmax; operands ``[B, heads, tokens, dim]``, decay ``[1, heads, queries, keys]``."""
    scores = (query * scale) @ key.transpose(-1, -2)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return (weights * decay.exp().to(weights.dtype)).to(value.dtype) @ value


def _with_codes(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, geometry: ManhattanGeometry, scale: float
) -> Tensor:
    """The decay inside, by position codes; operands ``[B, heads, tokens, dim]``."""
    code = map_code(geometry.height, geometry.width, log_decay.dtype, log_decay.device)
    # twice the distance is a constant, which the softmax does not see, less the inner product of the codes
    steepness = (log_decay * (-0.5 / scale))[:, None, None] * code
    query, key = (
        torch.cat([part, extra.to(part.dtype).expand(*part.shape[:2], -1, -1)], dim=-1)
        for part, extra in ((query, steepness), (key, code))
    )
    padded = F.pad(value, (0, code.shape[-1]))  # fused kernels want all three as wide
    mixed = F.scaled_dot_product_attention(query, key, padded, dropout_p=geometry.dropout, scale=scale)
    return mixed[..., : value.shape[-1]]


def _axis_code(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    entries = (length + CODE_ALIGNMENT - 1) // CODE_ALIGNMENT * CODE_ALIGNMENT  # the surplus is -1 everywhere
    above = torch.arange(length, device=device)[:, None] > torch.arange(entries, device=device)
    return above.to(dtype) * 2 - 1


def _check(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, geometry: ManhattanGeometry, bias: Tensor | None
) -> None:
    check_placement(geometry.placement, "placement")
    tokens = geometry.prefix_tokens + geometry.height * geometry.width
    keys = tokens if geometry.keys is None else geometry.keys[0] * geometry.keys[1]
    counts = tuple(math.prod(part.shape[1:-2]) for part in (query, key, value))
    if query.ndim not in (4, 5) or query.shape[-2:] != key.shape[-2:] or counts != (tokens, keys, keys):
        shapes = ", ".join(str(list(part.shape)) for part in (query, key, value))
        raise ArgumentError(
            f"query, key, value: must all be [B, tokens, heads, head_dim] of {tokens} queries and {keys} keys, "
            f"got {shapes}"
        )
    if log_decay.shape != query.shape[-2:-1]:
        raise ArgumentError(f"log_decay: must be [{query.shape[-2]}], one a head, got {list(log_decay.shape)}")
    special = geometry.prefix_tokens > 0 or geometry.keys is not None or bias is not None
    if special and (geometry.decomposed or (geometry.by_codes and geometry.placement == "inside")):
        raise ArgumentError(
            "geometry: prefix tokens, coarser keys and a bias need the full form without codes; leave out decomposed "
            "and by_codes"
        )
    if geometry.dropout and (geometry.decomposed or geometry.placement == "outside"):
        raise ArgumentError("dropout: only the full form with the decay inside drops weights; use 0")
