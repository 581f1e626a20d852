"""Normalized head vectors, and the learned scale of their scores, on heads-last queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_heads(
    value: Tensor, kind: str, place: str, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``value`` ``[..., head_dim]`` with every head vector divided by its length, in ``value``'s dtype.

    Args:
        kind: ``"l2"`` (Swin V2, Liu et al. 2022, equation 2), ``"rms"`` or ``"layer"`` norm.
        place: where ``eps`` stands: ``"root"`` under the root of the squares, as in RMS and layer norm; of an L2 norm
            also ``"clamp"``, the least length, and ``"added"`` to the length.
        weight, bias: ``[head_dim]``, applied to the result.
    """
    size = value.shape[-1:]
    if kind == "layer":
        return F.layer_norm(value, size, weight, bias, eps).to(value.dtype)
    if kind == "rms":
        made = F.rms_norm(value, size, weight, eps)
    else:
        made = _unit(value, place, eps)
        made = made if weight is None else made * weight
    return (made if bias is None else made + bias).to(value.dtype)


def scale_heads(query: Tensor, scale: Tensor) -> Tensor:
    """``[..., heads, head_dim]`` times one number per head, or one for all: what multiplies a head's scores."""
    return query * scale.reshape(-1, 1).to(query.dtype)


def _unit(value: Tensor, place: str, eps: float) -> Tensor:
    if place == "clamp":
        return F.normalize(value, dim=-1, eps=eps)
    if place == "root":
        return value * torch.rsqrt(value.square().sum(-1, keepdim=True) + eps)
    return value / (torch.linalg.vector_norm(value, dim=-1, keepdim=True) + eps)
