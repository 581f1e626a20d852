"""The operators as functions of tensors, with their arguments checked.

Maps are ``[B, *grid, heads, head_dim]`` with a grid of one, two or three axes, and may lie in memory in any way. All
functions work under ``torch.compile(fullgraph=True)``, ``torch.export`` (also with dynamic batch, height and width),
autocast, inference mode, ``torch.func`` transforms, and have derivatives of any order; first derivatives run on the
backend that ran the call, others and transforms on an operator's plain form.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from .errors import ArgumentError
from .operators import (
    AXIAL_ATTENTION,
    BIASED_ATTENTION,
    CONV_GLU,
    GROUPED_ATTENTION,
    LOCAL_ATTENTION,
    SOFT_SPLIT,
    AxialProblem,
    BiasedProblem,
    ConvGluProblem,
    GroupedProblem,
    LocalProblem,
    Operator,
    SoftSplitProblem,
)
from .operators.attention_problem import AttentionProblem, default_scale, map_rank
from .operators.index_rule import CLAMP, per_axis

PerAxis = int | Sequence[int]
Attended = Tensor | tuple[Tensor, Tensor]


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    dropout: float = 0.0,
) -> Attended:
    """Attend to the ``kernel_size`` nearest keys along each axis (Hassani et al. 2023, Neighborhood Attention).

    Windows slide inward at borders, so that every query sees equally many keys, unless ``is_causal`` cuts them off.
    ``dilation`` (Hassani and Shi 2022) spaces the keys; ``stride`` (Hassani et al. 2025) lets that many neighboring
    queries share one window, so that a stride equal to the kernel size gives blocks. The rule is NATTEN's.

    Args:
        query, key: ``[B, *grid, heads, head_dim]``, any floating dtype; keys and values may have fewer heads, each for
            equally many consecutive heads of the query (grouped-query attention).
        value: ``[B, *grid, heads, value_dim]``.
        kernel_size, dilation, stride, is_causal: one value, or one an axis; in tokens.
        scale: of the dot products; None is ``head_dim ** -0.5``.
        bias: ``[heads, 2 * kernel_size - 1 an axis]``, added to the logits, indexed by key minus query in (dilated)
            steps plus ``kernel_size - 1``.
        additional_keys, additional_values: ``[B, additional, heads, head_dim]`` and ``[..., value_dim]``, seen by every
            query.
        backend: the name of one of ``attnrewrite.lowering.available_backends()``; None chooses.
        return_lse: also return the log-sum-exp of the logits.
        dropout: rate on the attention weights; the plain form drops them.

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
    return local_attention(
        query, key, value, kernel_size, boundary=CLAMP, dilation=dilation, stride=stride, is_causal=is_causal,
        scale=scale, bias=bias, additional_keys=additional_keys, additional_values=additional_values, dropout=dropout,
        backend=backend, return_lse=return_lse,
    )  # fmt: skip


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    *,
    boundary: str,
    dilation: PerAxis = 1,
    stride: PerAxis = 1,
    offset: PerAxis = 0,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_bias: Tensor | None = None,
    place_bias: Tensor | None = None,
    post: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Attended:
    """Attend to a window around every query and to keys that all queries share, in one softmax.

    Arguments and results are those of ``neighborhood_attention``, and these:

    Args:
        boundary: ``"clamp"``: windows slide inward at borders (neighborhood attention). ``"mask"``: they stay around
            their query, and places beyond the map are absent (pixel-focused and aggregated attention; Shi 2024,
            TransNeXt, sections 3.1 and 3.2); they may then exceed the map, and a bias without stride has
            ``kernel_size`` entries an axis, indexed by key minus query plus ``kernel_size // 2``.
        offset: where queries that share a window begin, ``0 <= offset < stride``. With ``"mask"`` and a stride of the
            kernel size these are Swin's shifted windows.
        additional_bias: ``[heads, *grid, additional]`` or what broadcasts to it, added to the additional keys' logits.
        place_bias: ``[heads, *grid, places]`` or what broadcasts to it, added to the logits of each query's own window
            (places in row-major order).
        post: ``[B, *grid, heads, places]``, added to the weights of the window's places after the softmax; what it has
            for places beyond the map counts nothing.
    """
    rank = map_rank(query)
    kernel, pixels = per_axis(kernel_size, rank, "kernel_size"), (query.shape[-2], *query.shape[1:-2])
    if additional_bias is not None and additional_keys is not None:
        additional_bias = _broadcast("additional_bias", additional_bias, (*pixels, additional_keys.shape[1]))
    if place_bias is not None:
        place_bias = _broadcast("place_bias", place_bias, (*pixels, prod(kernel)))
    problem = LocalProblem(
        query, for_every_head(query, key), for_every_head(query, value), bias, additional_keys, additional_values,
        additional_bias, place_bias, post, kernel, per_axis(stride, rank, "stride"),
        per_axis(dilation, rank, "dilation"), per_axis(offset, rank, "offset"),
        per_axis(is_causal, rank, "is_causal"), boundary, default_scale(scale, query.shape[-1]),
    )  # fmt: skip
    return _attend(LOCAL_ATTENTION, problem, dropout, backend, return_lse)


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: PerAxis,
    shift: PerAxis = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    pad_key: Tensor | None = None,
    pad_value: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    *,
    interval: PerAxis = 1,
    rolled: bool = False,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    dropout: float = 0.0,
) -> Attended:
    """Attend inside the groups of a partition of the map.

    An axis is cut into regions of ``window_size * interval`` tokens, the first of which ends at ``shift``; tokens of a
    region an ``interval`` apart are a group. An interval of 1 gives the windows of Swin (Liu et al. 2021): a shift is
    exactly its shifted windows with their mask, but without the cyclic roll, for windows at the borders are truncated.
    Longer ones give CrossFormer's long distance attention (Wang et al. 2022).

    Args:
        query, key: ``[B, *grid, heads, head_dim]``, any floating dtype; keys and values may have fewer heads, as in
            ``neighborhood_attention``.
        value: ``[B, *grid, heads, value_dim]``.
        window_size, shift, interval: one value, or one an axis; in tokens, ``0 <= shift < window_size * interval``.
        rolled: roll the map by ``shift`` before it is padded, so that the tokens that are rolled over join the last
            real ones; it matters where the map is no multiple of the window.
        scale: of the dot products; None is ``head_dim ** -0.5``.
        bias: ``[heads, n, n]`` for the n positions of a full group in row-major order, query by key.
        pad_key, pad_value: ``[heads, head_dim]`` and ``[heads, value_dim]``. If given, the map counts as padded
            at the end of each axis to whole regions, and padded positions are keys like this, as
            in Swin. If not, only tokens are attended to.
        additional_keys, additional_values: ``[B, additional, heads, head_dim]`` and ``[..., value_dim]``, seen by every
            query, without bias.
        dropout: rate on the attention weights; the plain form drops them.
        backend: the name of one of ``attnrewrite.lowering.available_backends()``; None chooses.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        As ``neighborhood_attention``.

    Raises:
        ArgumentError: for arguments that do not fit each other.
        BackendError: if the backend is unknown or cannot run this.
    """
    rank = map_rank(query)
    problem = GroupedProblem(
        query, for_every_head(query, key), for_every_head(query, value), bias, pad_key, pad_value,
        additional_keys, additional_values, per_axis(window_size, rank, "window_size"),
        per_axis(shift, rank, "shift"), per_axis(interval, rank, "interval"), rolled,
        default_scale(scale, query.shape[-1]),
    )  # fmt: skip
    return _attend(GROUPED_ATTENTION, problem, dropout, backend, return_lse)


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sides: tuple[int, int],
    *,
    key_sides: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    log_decay: Tensor | None = None,
    table: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Attended:
    """Attend to all keys, with a bias that the positions on the map determine and that is never in memory as a whole.

    Args:
        query: ``[B, prefix_tokens + H * W, heads, head_dim]``, the map in raster order.
        key, value: the same (values may have channels of their own), or those of the map of ``key_sides``.
        sides: ``(H, W)``.
        key_sides: rows and columns of a coarser map of keys, which lie at the centers of its cells; None is ``sides``.
        prefix_tokens: tokens before those of the map, whose logits have no bias.
        log_decay: ``[heads]``, at most 0, float32 or float64: times the Manhattan distance in steps of the queries' map
            it adds to the logits (Fan et al. 2024, RMT, section 3).
        table: ``[heads, 2 H - 1, 2 W - 1]``, added to the logits by key minus query.
        scale, dropout, backend, return_lse: as for ``neighborhood_attention``.

    Returns:
        ``[B, tokens, heads, value_dim]``, and with ``return_lse`` also ``[B, tokens, heads]``.

    Raises:
        ArgumentError: for arguments that do not fit each other.
        BackendError: if the backend is unknown or cannot run this.
    """
    problem = BiasedProblem(
        query, for_every_head(query, key), for_every_head(query, value), log_decay, table, sides, key_sides or sides,
        prefix_tokens, default_scale(scale, query.shape[-1]),
    )  # fmt: skip
    return _attend(BIASED_ATTENTION, problem, dropout, backend, return_lse)


def axial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: int,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    return_lse: bool = False,
) -> Attended:
    """Attend along one axis of a map; along rows and then along columns it is RMT's decomposed Manhattan attention.

    Args:
        query, key: ``[B, H, W, heads, head_dim]``.
        value: ``[B, H, W, heads, value_dim]``.
        axis: 1 is along rows (tokens of one row see each other), 0 along columns.
        log_decay: ``[heads]``, at most 0, float32 or float64: times the distance it adds to the logits.
        scale, dropout, backend, return_lse: as for ``neighborhood_attention``.

    Returns:
        As ``neighborhood_attention``.

    Raises:
        ArgumentError: for arguments that do not fit each other.
        BackendError: if the backend is unknown or cannot run this.
    """
    key, value = for_every_head(query, key), for_every_head(query, value)
    problem = AxialProblem(query, key, value, log_decay, axis, default_scale(scale, query.shape[-1]))
    return _attend(AXIAL_ATTENTION, problem, dropout, backend, return_lse)


def conv_glu(
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    value: Tensor | None = None,
    *,
    activation: str = "gelu",
    pre_activation: str = "identity",
    backend: str | None = None,
) -> Tensor:
    """``activation(DWConv(pre_activation(gate))) * value``: a convolutional gate (Shi 2024, TransNeXt, section 3.3).

    Args:
        gate: ``[B, H, W, channels]``.
        weight, bias: ``[channels, 1, k, k]`` and ``[channels]`` of a depthwise convolution, ``k`` odd, stride 1, zero
            padded to the same map.
        value: like ``gate``; None multiplies by nothing.
        activation, pre_activation: names of ``numerics.activations.ACTIVATIONS``.
        backend: the name of one of ``attnrewrite.lowering.available_backends()``; None chooses.

    Returns:
        A map like ``gate``.

    Raises:
        ArgumentError: for arguments that do not fit each other, or an unknown activation.
        BackendError: if the backend is unknown or cannot run this.
    """
    return CONV_GLU(ConvGluProblem(gate, weight, bias, value, activation, pre_activation), backend)[0]


def soft_split(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Project overlapping patches, normalized or not, without making them (Yuan et al. 2021, T2T-ViT).

    Args:
        image: ``[B, C, H, W]``, any floating dtype.
        weight, bias: ``[out, C * kernel_size ** 2]`` and ``[out]``; patch channels are ordered as ``torch.nn.Unfold``
            orders them: channel, then row, then column.
        kernel_size, stride, padding: of the patches, in pixels.
        norm_weight, norm_bias, eps: of a layer norm of every patch before the map; then the arithmetic is in float32 at
            least, also under autocast.
        backend: the name of one of ``attnrewrite.lowering.available_backends()``; None chooses.

    Returns:
        ``[B, H', W', out]``, contiguous; with a norm in the dtype of ``weight``.

    Raises:
        ArgumentError: for arguments that do not fit each other.
        BackendError: if the backend is unknown or cannot run this.
    """
    problem = SoftSplitProblem(image, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding, eps)
    return SOFT_SPLIT(problem, backend)[0]


def for_every_head(query: Tensor, part: Tensor) -> Tensor:
    """Keys or values with the query's heads: where they have fewer, each serves equally many consecutive ones."""
    heads, own = query.shape[-2], part.shape[-2] if part.dim() > 2 else 0
    if own == heads or own == 0:
        return part
    if heads % own:
        raise ArgumentError(f"query has {heads} heads, key or value {own}: they must divide the query's")
    return part.repeat_interleave(heads // own, dim=-2)


def _broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}, expected what broadcasts to {shape}") from None


def _attend(
    operator: Operator[Any], problem: AttentionProblem, dropout: float, backend: str | None, return_lse: bool
) -> Attended:
    if dropout:
        problem = problem.autocast()
        problem.check()
        output, lse = problem.plain(dropout)
    else:
        output, lse = operator(problem, backend)
    return (output, lse) if return_lse else output
