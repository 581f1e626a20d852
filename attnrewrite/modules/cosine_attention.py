"""Length-scaled cosine attention (Shi 2024, TransNeXt, section 3.2.3), for maps of any size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.formulas import self_attention
from ..algebra.module_formula import CostedCall
from ..algebra.site_formula import TABLE, E, Extent, SiteFormula, h
from ..errors import ArgumentError
from ..ir.heads import as_pair
from .heads import require_heads, widths_of
from .initialization import initialize
from .log_cpb import BiasCache, Size, log_cpb, resample_bias

CPB_HIDDEN = 512
INITIAL_SCALE = 1 / 0.24


class ScoreOptions(TypedDict, total=False):
    """Options of ``LengthScaledAttention`` that its subclasses hand on."""

    qk_norm: bool
    scale: float | None
    length_scale: bool
    query_embedding: bool
    pretrain_size: int | Size | None
    interpolate_bias: bool
    attn_drop: float
    proj_drop: float


class LengthScaledAttention(nn.Module, ABC):
    """What ``CosineAttention`` and ``AggregatedAttention`` share: scores
    ``scale * ln(keys seen) * (unit query + query embedding) . unit key``, and a log-spaced continuous position bias.

    In eval mode without gradients the bias of the last size is kept, until the weights change.

    Args:
        dim: channels.
        num_heads: heads; they divide ``dim``.
        qk_norm: whether queries and keys are scaled to unit length.
        scale: of the scores; None is softplus of a parameter per head, ``temperature``.
        length_scale: whether scores grow with the logarithm of how many keys the query sees.
        query_embedding: whether a parameter is added to the (unit) queries.
        position_bias: whether there is a position bias.
        pretrain_size: of the map in pretraining, a side or (height, width), the unit of length of the position bias;
            None is the map itself.
        interpolate_bias: whether on other maps the bias of the pretraining size is resampled, rather than computed
            for the map.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the result.

    Raises:
        ArgumentError: if the heads do not divide the channels, or for an interpolated bias of no size.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool = True,
        scale: float | None = None,
        length_scale: bool = True,
        query_embedding: bool = True,
        position_bias: bool = True,
        pretrain_size: int | Size | None = None,
        interpolate_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        if interpolate_bias and pretrain_size is None:
            raise ArgumentError("pretrain_size: interpolate_bias resamples the bias of that size; pass it")
        self.num_heads, self.qk_norm, self.scale, self.length_scale = num_heads, qk_norm, scale, length_scale
        self.pretrain_size = None if pretrain_size is None else as_pair(pretrain_size)
        if self.pretrain_size is not None and min(self.pretrain_size) < 1:
            raise ArgumentError(f"pretrain_size: sides must be at least 1, got {pretrain_size}")
        self.interpolate_bias = interpolate_bias
        self.temperature = self.query_embedding = self.cpb_fc1 = self.cpb_fc2 = None
        if scale is None:
            self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(INITIAL_SCALE))))
        if query_embedding:
            embedding = torch.empty(num_heads, 1, dim // num_heads)
            self.query_embedding = nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02))
        if position_bias:
            self.cpb_fc1 = nn.Linear(2, CPB_HIDDEN)
            self.cpb_fc2 = nn.Linear(CPB_HIDDEN, num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self._bias_cache = BiasCache()

    def heads(self, projected: Tensor) -> Tensor:
        """``[B, tokens, C]`` to ``[B, heads, tokens, head_dim]``."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def unit(self, vectors: Tensor) -> Tensor:
        """Scaled to unit length along the last axis, if queries and keys are."""
        if not self.qk_norm:
            return vectors
        half = vectors.dtype in (torch.float16, torch.bfloat16)
        shortest = max(1e-12, torch.finfo(vectors.dtype).tiny)  # below it, gradients would leave the range of float16
        return F.normalize(vectors.float() if half else vectors, dim=-1, eps=shortest).to(vectors.dtype)

    def scaled_query(self, unit: Tensor, seen: Tensor) -> Tensor:
        """The queries to score with.

        Args:
            unit: ``[B, heads, tokens, head_dim]``.
            seen: how many keys each of them sees, ``[tokens]`` or the same for all, ``[1]``.
        """
        embedded = unit if self.query_embedding is None else unit + self.query_embedding
        wide = torch.float64 if unit.dtype == torch.float64 else torch.float32
        factor: Tensor | float = 1.0 if self.scale is None else self.scale
        if self.temperature is not None:
            factor = F.softplus(self.temperature.to(wide))
        if self.length_scale:
            factor = factor * seen.to(wide).log()[:, None]
        return (embedded * factor).to(unit.dtype)

    @abstractmethod
    def key_grid(self, pixels: Size) -> Size:
        """Rows and columns of the keys that have a position bias, for a map of ``pixels``."""

    def position_bias(self, pixels: Size, cells: Size) -> Tensor | None:
        """``[heads, H * W, rows * columns]``."""
        if self.cpb_fc1 is None or self.cpb_fc2 is None:
            return None
        fc1, fc2, pretrain = self.cpb_fc1, self.cpb_fc2, self.pretrain_size or pixels

        def compute() -> Tensor:
            if not self.interpolate_bias:
                return log_cpb(fc1, fc2, pixels, cells, pretrain)
            trained_cells = self.key_grid(pretrain)
            trained = log_cpb(fc1, fc2, pretrain, trained_cells, pretrain)
            return resample_bias(trained, pretrain, trained_cells, pixels, cells)

        if self.training or torch.is_grad_enabled():
            return compute()
        return self._bias_cache.get([*fc1.parameters(), *fc2.parameters()], (*pixels, *cells, *pretrain), compute)

    def with_position_bias(self, formula: SiteFormula, offsets: Extent) -> SiteFormula:
        """The cost with that of the position bias, an MLP of 2 to E to heads channels, once for each of T relative
        ``offsets``, whatever the batch: ``T(2E + Eh)``. It can be folded at a fixed size."""
        if self.cpb_fc1 is None:
            return formula
        return formula.plus({TABLE: offsets, E: CPB_HIDDEN}, once=TABLE * (2 * E + E * h))

    def dense(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """``softmax(query key^T + bias) value``, with heads-first operands."""
        bias = None if bias is None else bias.to(value.dtype)
        rate = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, bias, rate, scale=1.0)

    def project(self, mixed: Tensor) -> Tensor:
        """``[B, heads, tokens, head_dim]`` to ``[B, tokens, C]``, through the output projection."""
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        scale = "learned" if self.scale is None else f"{self.scale:.4g}"
        return f"num_heads={self.num_heads}, qk_norm={self.qk_norm}, scale={scale}, length_scale={self.length_scale}"


class CosineAttention(LengthScaledAttention):
    """Every pixel attends to the whole map, with ``LengthScaledAttention``'s scores (the last stage of TransNeXt).

    Args:
        dim, num_heads, position_bias, options: of ``LengthScaledAttention``.
        qkv_bias: whether the projection to queries, keys and values has a bias.
    """

    costed_call = CostedCall()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        position_bias: bool = True,
        **options: Unpack[ScoreOptions],
    ) -> None:
        super().__init__(dim, num_heads, position_bias=position_bias, **options)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.apply(initialize)

    def key_grid(self, pixels: Size) -> Size:
        return pixels

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape."""
        pixels = (source.shape[1], source.shape[2])
        query, key, value = map(self.heads, self.qkv(source.flatten(1, 2)).chunk(3, dim=-1))
        seen = torch.full((1,), pixels[0] * pixels[1], device=source.device)
        query = self.scaled_query(self.unit(query), seen)
        mixed = self.dense(query, self.unit(key), value, self.position_bias(pixels, pixels))
        return self.project(mixed).unflatten(1, pixels)

    def formula(self, height: Extent, width: Extent) -> SiteFormula | None:
        """``4NC² + 2N²C`` and the position bias; None where it is resampled."""
        if self.interpolate_bias:
            return None
        formula = self_attention(height * width, widths_of(self.proj, self.num_heads))
        return self.with_position_bias(formula, (2 * height - 1) * (2 * width - 1))
