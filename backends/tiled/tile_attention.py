"""Attention inside tiles, forward and backward: by torch's fused kernel for a CPU, or by explicit products.

Explicit products take logits to base 2, because the vectorised ``exp`` of a CPU leaves its fast path at -inf (masked
keys) and ``exp2`` does not: a factor of eight for that step.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from ...numerics.private_kernels import private_kernel

LOG_2 = log(2)


class Tile(NamedTuple):
    """A run of tiles ``[tiles, heads, points or keys, channels]``, and what is added to the scaled logits.

    ``terms`` is ``[heads or 1, points, keys]``; None adds nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    terms: Tensor | None
    scale: float


class Outcome(NamedTuple):
    """What attention gave for its queries, ``[..., channels or 1]``, and the gradients that arrive there."""

    output: Tensor
    lse: Tensor
    grad_output: Tensor
    grad_lse: Tensor


class TileGradients(NamedTuple):
    """Gradients ``[tiles, heads, points or keys, channels]`` and of the logits; the fused kernel keeps the latter."""

    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor | None


Attention = Callable[[Tile], tuple[Tensor, Tensor]]
Derivative = Callable[[Tile, Outcome], TileGradients]


def outcome_of(results: tuple[Tensor, ...], arrived: tuple[Tensor | None, ...]) -> Outcome:
    """Results and gradients of an attention operator; a gradient that does not arrive is zero."""
    output, lse = results
    grad_output, grad_lse = (
        torch.zeros_like(result) if gradient is None else gradient
        for result, gradient in zip(results, arrived, strict=True)
    )
    return Outcome(output, lse[..., None], grad_output, grad_lse[..., None])


def fits_fused_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for a CPU takes them: values as wide as queries, and no empty axis."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and query.numel() > 0


def attention_by(fused: bool) -> Attention:
    """Mixed values, and the log-sum-exp ``[tiles, heads, points, 1]``, by the fused kernel or by explicit products."""
    return _fused if fused else _explicit


def derivative_by(fused: bool) -> Derivative:
    """The gradients of a tile; those of its terms, and of the log-sum-exp, by explicit products alone."""
    return _fused_backward if fused else _explicit_backward


def _fused(tile: Tile) -> tuple[Tensor, Tensor]:
    """Mixed values, and the log-sum-exp ``[tiles, heads, points, 1]``.

    Values must be as wide as queries, and no axis empty. A query whose terms are all -inf gets zeros instead of NaN.
    """
    terms = None if tile.terms is None else tile.terms[None]
    mixed, lse = private_kernel(
        "_scaled_dot_product_flash_attention_for_cpu",
        tile.query,
        tile.key,
        tile.value,
        0.0,
        False,
        attn_mask=terms,
        scale=tile.scale,
    )
    return mixed, lse[..., None]


def _explicit(tile: Tile) -> tuple[Tensor, Tensor]:
    """The same for values of any width; a query whose terms are all -inf gets NaN, and -inf as log-sum-exp."""
    logits = (tile.query * (tile.scale / LOG_2)) @ tile.key.mT
    if tile.terms is not None:
        logits += tile.terms / LOG_2
    peak = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    weights = logits.sub_(peak).exp2_()
    total = weights.sum(-1, keepdim=True)
    return (weights @ tile.value).div_(total), total.log2_().add_(peak).mul_(LOG_2)


def _fused_backward(tile: Tile, outcome: Outcome) -> TileGradients:
    """Gradients where none arrives at the log-sum-exp; for the tiles that ``_fused`` takes."""
    terms = None if tile.terms is None else tile.terms[None]
    query, key, value = private_kernel(
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        outcome.grad_output,
        tile.query,
        tile.key,
        tile.value,
        outcome.output,
        outcome.lse[..., 0],
        0.0,
        False,
        attn_mask=terms,
        scale=tile.scale,
    )
    return TileGradients(query, key, value, None)


def _explicit_backward(tile: Tile, outcome: Outcome) -> TileGradients:
    """Gradients, with those of the logits."""
    query = tile.query * tile.scale
    logits = (query / LOG_2) @ tile.key.mT
    if tile.terms is not None:
        logits += tile.terms / LOG_2
    probabilities = logits.sub_(outcome.lse / LOG_2).exp2_()
    grad_mean = (outcome.grad_output * outcome.output).sum(-1, keepdim=True).sub_(outcome.grad_lse)
    grad_logits = (outcome.grad_output @ tile.value.mT).sub_(grad_mean).mul_(probabilities)
    return TileGradients(
        (grad_logits @ tile.key).mul_(tile.scale),
        grad_logits.mT @ query,
        probabilities.mT @ outcome.grad_output,
        grad_logits,
    )
