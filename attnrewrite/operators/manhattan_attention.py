"""Manhattan attention (MaSA of RMT; Fan et al., CVPR 2024, section 3): weights decay with the distance on the map.

Full form: every token attends to the whole map, with ``log_decay * (|rows apart| + |columns apart|)`` added to the
scores (``inside``, as in all released code), or with the weights multiplied by its exponential after the softmax
(``outside``, the paper's equation). Decomposed form: attention along rows, then, with the same queries and keys, along
columns to what the rows gave.

With the decay inside they are calls of the operators ``biased_attention`` and ``axial_attention``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, nearest
from .axial_attention import ALONG_COLUMNS, ALONG_ROWS, AXIAL_ATTENTION, AxialProblem
from .biased_attention import BIASED_ATTENTION, BiasedProblem, axis_distance

PLACEMENTS = ("inside", "outside")


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
    """

    height: int
    width: int
    prefix_tokens: int = 0
    keys: tuple[int, int] | None = None
    decomposed: bool = False
    placement: str = "inside"
    scale: float | None = None
    dropout: float = 0.0

    def macs(self, heads: int, head_dim: int, value_dim: int) -> int:
        """Multiply-accumulates of one image, by definition.

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
    query, key, value = (part.flatten(1, -3) for part in (query, key, value))
    mixed = _over_the_map(query, key, value, log_decay, geometry, bias, scale)
    return mixed.unflatten(1, sides) if on_map else mixed


def map_bias(log_decay: Tensor, height: int, width: int, cells: tuple[int, int] | None = None) -> Tensor:
    """``[heads, H * W, H * W]``, or ``[heads, H * W, cells]``: the decay's logarithm times the Manhattan distance."""
    rows, columns = (
        axis_distance(side, count, log_decay.dtype, log_decay.device)
        for side, count in zip((height, width), cells or (height, width), strict=True)
    )
    return log_decay[:, None, None] * (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)


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
    """The full form; operands ``[B, tokens, heads, dim]``."""
    sides, prefix = (geometry.height, geometry.width), geometry.prefix_tokens
    if geometry.placement == "inside" and bias is None:
        call = BiasedProblem(query, key, value, log_decay, None, sides, geometry.keys or sides, prefix, scale)
        return call.plain(geometry.dropout)[0] if geometry.dropout else BIASED_ATTENTION(call)[0]
    decay = F.pad(map_bias(log_decay, *sides, geometry.keys), (prefix, 0, prefix, 0))[None]
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if geometry.placement == "outside":
        return _decayed_weights(query, key, value, decay, bias, scale).transpose(1, 2)
    added = (decay if bias is None else decay + bias).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, added, geometry.dropout, scale=scale).transpose(1, 2)


def _along_axes(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, inside: bool, scale: float) -> Tensor:
    """The decomposed form, of a map ``[B, H, W, heads, dim]``."""
    for axis in (ALONG_ROWS, ALONG_COLUMNS):
        call = AxialProblem(query, key, value, log_decay, axis, scale)
        value = AXIAL_ATTENTION(call)[0] if inside else _decayed_line_weights(call)
    return value


def _decayed_line_weights(call: AxialProblem) -> Tensor:
    """The decay after the softmax, along one axis."""
    assert call.log_decay is not None
    query, key, value = (call.lines(part).transpose(1, 2) for part in (call.query, call.key, call.value))
    decay = map_bias(call.log_decay, 1, query.shape[2])[None]
    return call.from_lines(_decayed_weights(query, key, value, decay, None, call.scale).transpose(1, 2))


def _decayed_weights(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """The decay after the softmax; operands ``[B, heads, tokens, dim]``, decay ``[1, heads, queries, keys]``."""
    scores = (query * scale) @ key.transpose(-1, -2)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return (weights * decay.exp().to(weights.dtype)).to(value.dtype) @ value


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
    if special and geometry.decomposed:
        raise ArgumentError("geometry: prefix tokens, coarser keys and a bias need the full form; leave out decomposed")
    if geometry.dropout and (geometry.decomposed or geometry.placement == "outside"):
        raise ArgumentError("dropout: only the full form with the decay inside drops weights; use 0")
