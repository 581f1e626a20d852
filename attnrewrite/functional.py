"""Attention as functions of tensors, with their arguments checked.

Maps are ``[B, *grid, heads, head_dim]`` with a grid of one, two or three axes. Both functions work under
``torch.compile(fullgraph=True)``, ``torch.export`` (also with a dynamic batch), autocast and inference mode. They
have no forward-mode derivative and no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from .numerics.precision import autocast
from .operators import grouped_attention as grouped_attention_op
from .operators import local_attention as local_attention_op
from .operators.arguments import (
    check_additional,
    check_alike,
    check_both,
    check_maps,
    check_shape,
    needs_gradient,
    refuse_forward_mode,
)
from .operators.dispatch import Request, select_backend
from .operators.grouped_attention import grouped_request
from .operators.index_rule import Neighborhood, axis_rules, check_rules, per_axis
from .operators.local_attention import local_request
from .operators.partition_rule import Windows, axis_partitions, check_partitions


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the ``kernel_size`` nearest keys along each axis (Hassani et al. 2023, Neighborhood Attention).

    Windows slide inward at borders, so that every query sees equally many keys, unless ``is_causal`` cuts them off.
    ``dilation`` (Hassani and Shi 2022) spaces the keys; ``stride`` (Hassani et al. 2025) lets that many neighboring
    queries share one window, so that a stride equal to the kernel size gives blocks. The rule is NATTEN's.

    Args:
        query, key: ``[B, *grid, heads, head_dim]``, any floating dtype.
        value: ``[B, *grid, heads, value_dim]``.
        kernel_size, dilation, stride, is_causal: one value, or one an axis; in tokens.
        scale: of the dot products; None is ``head_dim ** -0.5``.
        bias: ``[heads, 2 * kernel_size - 1 an axis]``, added to the logits, indexed by key minus query in (dilated)
            steps plus ``kernel_size - 1``.
        additional_keys, additional_values: ``[B, additional, heads, head_dim]`` and ``[..., value_dim]``, seen by every
            query, without bias.
        backend: the name of one of ``attnrewrite.lowering.available_backends()``; None chooses.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        ``[B, *grid, heads, value_dim]``, and with ``return_lse`` also ``[B, *grid, heads]`` (natural logarithm,
        float32 for half precision). Gradients flow through both.

        A query whose every logit is -inf by its bias gets NaN, and -inf as log-sum-exp. NaN or infinity in a key, value
        or query (and NaN gradients of such a query) may reach more than the neighbors: backend "tiled" computes boxes
        of queries with all the keys of a box around them, and weights of zero do not hide NaN. Only backend "reference"
        keeps them where they belong.

    Raises:
        ArgumentError: for arguments that do not fit each other.
        BackendError: if the backend is unknown or cannot run this.
    """
    tensors = autocast(query, key, value, bias, additional_keys, additional_values)
    query, key, value, bias, additional_keys, additional_values = tensors
    check_maps(query, key, value)
    check_alike(query, bias=bias, additional_keys=additional_keys, additional_values=additional_values)
    check_additional(query, value, additional_keys, additional_values)
    geometry = _neighborhood(tuple(query.shape[1:-2]), kernel_size, stride, dilation, is_causal)
    check_shape("bias", bias, (query.shape[-2], *(2 * size - 1 for size in geometry.kernel_size)))
    name = _backend_name(backend, "local_attention", local_request, tensors, geometry)
    output, lse = local_attention_op(*tensors, *geometry, _scale(scale, query), name)
    return (output, lse) if return_lse else output


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend inside the windows of a partition of the map (Liu et al. 2021, Swin Transformer).

    Token c of an axis belongs to window floor((c - shift) / window_size). A shift gives exactly the shifted
    windows of Swin with their mask, but without the cyclic roll: windows at the borders are truncated.

    Args:
        query, key: ``[B, *grid, heads, head_dim]``, any floating dtype.
        value: ``[B, *grid, heads, value_dim]``.
        window_size, shift: one value, or one an axis; in tokens, ``0 <= shift < window_size``.
        scale: of the dot products; None is ``head_dim ** -0.5``.
        bias: ``[heads, n, n]`` for the n positions of a full window in row-major order, query by key.
        pad_key, pad_value: ``[heads, head_dim]`` and ``[heads, value_dim]``. If given, the map counts as padded
            at the end of each axis to a multiple of the window, and padded positions are keys like this, as
            in Swin. If not, only tokens are attended to.
        backend: the name of one of ``attnrewrite.lowering.available_backends()``; None chooses.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        As ``neighborhood_attention``.

    Raises:
        ArgumentError: for arguments that do not fit each other.
        BackendError: if the backend is unknown or cannot run this.
    """
    tensors = autocast(query, key, value, bias, pad_key, pad_value)
    query, key, value, bias, pad_key, pad_value = tensors
    rank = check_maps(query, key, value)
    check_alike(query, bias=bias, pad_key=pad_key, pad_value=pad_value)
    check_both("pad_key", pad_key, "pad_value", pad_value)
    check_shape("pad_key", pad_key, (query.shape[-2], query.shape[-1]))
    check_shape("pad_value", pad_value, (query.shape[-2], value.shape[-1]))
    geometry = Windows(per_axis(window_size, rank, "window_size"), per_axis(shift, rank, "shift"))
    check_partitions(axis_partitions(tuple(query.shape[1:-2]), *geometry, pad_key is not None))
    slots = prod(geometry.window_size)
    check_shape("bias", bias, (query.shape[-2], slots, slots))
    name = _backend_name(backend, "grouped_attention", grouped_request, tensors, geometry)
    output, lse = grouped_attention_op(*tensors, *geometry, _scale(scale, query), name)
    return (output, lse) if return_lse else output


def _neighborhood(
    grid: tuple[int, ...],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> Neighborhood:
    """The rule of a map, checked."""
    rank = len(grid)
    geometry = Neighborhood(
        per_axis(kernel_size, rank, "kernel_size"),
        per_axis(stride, rank, "stride"),
        per_axis(dilation, rank, "dilation"),
        per_axis(is_causal, rank, "is_causal"),
    )
    check_rules(axis_rules(grid, *geometry))
    return geometry


def _scale(scale: float | None, query: Tensor) -> float:
    return max(query.shape[-1], 1) ** -0.5 if scale is None else scale  # products of no channels are 0 at any scale


def _backend_name(
    backend: str | None,
    operator: str,
    describe: Callable[..., Request],
    tensors: tuple[Tensor | None, ...],
    geometry: Neighborhood | Windows,
) -> str:
    """Choose now, so that forward and backward agree; a traced graph chooses when it runs."""
    if torch.compiler.is_compiling():
        return backend or ""
    refuse_forward_mode(*tensors)
    query, _key, value, bias, extra_key, _extra_value = tensors
    request = describe(operator, query, value, bias, extra_key, geometry, needs_gradient(*tensors))
    return select_backend(request, backend).name
