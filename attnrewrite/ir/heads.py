"""Operands in the axis order of the site IR, to and from heads-last ``[batch, tokens, heads, dim]``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..graph.contraction import canonical
from .axes import position_and_dim


def heads_last(value: Tensor, axes: str, batch_groups: str, head_groups: str, head_sizes: tuple[int, ...]) -> Tensor:
    """``[batch, tokens, heads, dim]`` of an operand; without ``batch_groups`` its head axis holds batch and heads.

    ``head_sizes`` are the extents of the ``head_groups`` in one sample. An operand is the same for all heads along an
    axis that it lacks or has once.
    """
    position, dim = position_and_dim(axes)
    value = canonical(value, axes, batch_groups + head_groups + position + dim)
    extents = value.shape[len(batch_groups) : -2]
    shared = [size if extent == 1 else extent for extent, size in zip(extents, head_sizes, strict=True)]
    value = value.expand(*value.shape[: len(batch_groups)], *shared, *value.shape[-2:])
    return value.flatten(0, -3).unflatten(0, (-1, math.prod(head_sizes))).transpose(1, 2)


def from_heads_last(
    value: Tensor, axes: str, batch_groups: str, head_groups: str, head_sizes: tuple[int, ...]
) -> Tensor:
    """The inverse of ``heads_last``; ``head_sizes`` are the extents of the ``head_groups``."""
    position, dim = position_and_dim(axes)
    value = value.transpose(1, 2)
    if len(head_groups) > 1:
        value = value.unflatten(1, head_sizes)
    if not batch_groups:
        value = value.flatten(0, 1)
    for _ in batch_groups[1:]:
        value = value.unsqueeze(1)
    return canonical(value, batch_groups + head_groups + position + dim, axes)


def take_heads(projected: Tensor, start: int, heads: int, head_dim: int, head_step: int, dim_step: int) -> Tensor:
    """``[..., heads, head_dim]``: channel ``start + head * head_step + dim * dim_step`` of the last axis."""
    if (head_step, dim_step) == (head_dim, 1):
        return projected.narrow(-1, start, heads * head_dim).unflatten(-1, (heads, head_dim))
    head = torch.arange(heads, device=projected.device) * head_step
    dim = torch.arange(head_dim, device=projected.device) * dim_step
    return projected[..., start + head[:, None] + dim]


def merge_heads(mixed: Tensor, head_step: int, dim_step: int) -> Tensor:
    """``[..., heads * head_dim]`` with head ``h``, dim ``d`` at channel ``h * head_step + d * dim_step``."""
    return (mixed if dim_step == 1 else mixed.transpose(-1, -2)).flatten(-2)


def zero_token(source: Tensor) -> Tensor:
    """What a padded slot holds before the projection, ``[1, channels]``."""
    return source.new_zeros(1, source.shape[-1])


def map_channels(value: Tensor, convolution: nn.Module, rank: int) -> Tensor:
    """A convolution of kernel 1 as a linear map of the last axis of ``[batch, ..., channels]``.

    ``rank`` is that of the maps it takes; the places of a value with fewer axes are its samples.
    """
    axes = (-2,) * (rank - value.ndim)
    for axis in axes:
        value = value.unsqueeze(axis)
    result = convolution(value.movedim(-1, 1)).movedim(1, -1)
    for axis in axes:
        result = result.squeeze(axis)
    return result


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A size per axis, or one for both."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
