"""Checks of tensor arguments that the attention functions share; each raises ``ArgumentError``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ArgumentError, BackendError

MAX_RANK = 3


def check_maps(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Query, key and value are maps of one grid, one device and one floating dtype. Returns their rank."""
    rank = query.dim() - 3
    if not 1 <= rank <= MAX_RANK:
        raise ArgumentError(
            f"query has {query.dim()} dimensions, expected [B, *grid, heads, head_dim], 1 to {MAX_RANK} axes"
        )
    if not query.is_floating_point():
        raise ArgumentError(f"query is {query.dtype}: attention needs a floating dtype, convert it first")
    check_shape("key", key, tuple(query.shape))
    if value.shape[:-1] != query.shape[:-1]:
        raise ArgumentError(f"value has shape {tuple(value.shape)}, expected {(*query.shape[:-1], value.shape[-1])}")
    check_alike(query, key=key, value=value)
    return rank


def check_alike(query: Tensor, **others: Tensor | None) -> None:
    """All tensors share the query's dtype and device."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != query.dtype:
            raise ArgumentError(f"{name} is {other.dtype}, but query is {query.dtype}: convert one of them")
        if other.device != query.device:
            raise ArgumentError(f"{name} is on {other.device}, but query on {query.device}: move one of them")


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """An optional tensor has this shape."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_both(first_name: str, first: Tensor | None, second_name: str, second: Tensor | None) -> None:
    """Two optional tensors are given together or not at all."""
    if (first is None) != (second is None):
        given, missing = (second_name, first_name) if first is None else (first_name, second_name)
        raise ArgumentError(f"{given} is given without {missing}: give both or neither")


def check_additional(query: Tensor, value: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    """Additional keys and values come together, with the batch, heads and channels of key and value."""
    check_both("additional_keys", keys, "additional_values", values)
    if keys is None or values is None:
        return
    batch, heads, head_dim = query.shape[0], *query.shape[-2:]
    count = keys.shape[1] if keys.dim() == 4 else 1
    check_shape("additional_keys", keys, (batch, count, heads, head_dim))
    check_shape("additional_values", values, (batch, count, heads, value.shape[-1]))


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Will autograd ask for a backward?"""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise ``BackendError`` in forward-mode differentiation, where custom operators give a silent zero."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise BackendError(
            "the attention operators have no forward-mode derivative: use reverse mode, "
            "or call the functions of attnrewrite.backends.reference, which are plain torch"
        )
