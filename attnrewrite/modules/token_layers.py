"""The token layers of T2T-ViT (Yuan et al., "Tokens-to-Token ViT", ICCV 2021).

Both mix overlapping patches and make them narrow: attention over all patches, whose residual is the value (query, key
and value are narrower than the patch), then a feed-forward network of that width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from sympy import Expr, Rational
from torch import Tensor, nn

from ..algebra.site_formula import LAYER_NORM, STATE, ZERO, D, E, Extent, N, SiteFormula
from ..numerics.precision import accumulation_dtype, autocast_off
from ..operators.soft_split import PatchGrid
from .feed_forward import FeedForward
from .patch_projection import project_patches


class TokenLayer(nn.Module, ABC):
    """What both kinds share; ``norm1`` may be replaced by ``nn.Identity``."""

    norm1: nn.Module

    @abstractmethod
    def projection(self) -> nn.Linear:
        """The map to three parts, query, key and value in the kind's own order."""

    @abstractmethod
    def mix(self, projected: Tensor) -> Tensor:
        """``[B, N, 3 * out_dim]``, what ``projection`` gives, to ``[B, N, out_dim]``."""

    @abstractmethod
    def formula(self, tokens: Extent) -> SiteFormula:
        """The cost per image, on so many patches."""

    def norm_of_patches(self) -> Expr:
        """What fvcore charges for it."""
        return LAYER_NORM * N * D if isinstance(self.norm1, nn.LayerNorm) else ZERO

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, dim]`` to ``[B, N, out_dim]``."""
        return self.mix(self.projection()(self.norm1(tokens)))

    def forward_patches(self, image: Tensor, patches: PatchGrid) -> Tensor:
        """The same for the patches of an image ``[B, C, H, W]``, which are never gathered: ``[B, H', W', out_dim]``."""
        projected = project_patches(image, self.norm1, self.projection(), patches)
        return self.mix(projected.flatten(1, 2)).unflatten(1, projected.shape[1:3])


class ValueResidualAttention(nn.Module):
    """One head of softmax attention, added to its own value.

    Args:
        dim: channels in.
        out_dim: of query, key, value and output.
        qkv_bias: whether the first map has a bias.
        scale: of the dot products; None is ``dim ** -0.5``, of the wide input, as in the official code.
    """

    def __init__(self, dim: int, out_dim: int, qkv_bias: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.scale = dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias)
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, projected: Tensor) -> Tensor:
        """``[B, N, 3 * out_dim]``, what ``qkv`` gives, to ``[B, N, out_dim]``."""
        query, key, value = projected.unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return (value + self.proj(mixed)).squeeze(1)


class TokenTransformer(TokenLayer):
    """The token layer with softmax attention: quadratic in the number of patches.

    Args:
        dim: channels of a patch.
        out_dim: channels of a token.
        mlp_ratio: hidden channels of the feed-forward network over ``out_dim``.
        qkv_bias, scale: as in ``ValueResidualAttention``.
    """

    def __init__(
        self, dim: int, out_dim: int, mlp_ratio: float = 1.0, qkv_bias: bool = False, scale: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ValueResidualAttention(dim, out_dim, qkv_bias, scale)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = FeedForward(out_dim, int(out_dim * mlp_ratio))

    def projection(self) -> nn.Linear:
        return self.attn.qkv

    def mix(self, projected: Tensor) -> Tensor:
        tokens = self.attn(projected)
        return tokens + self.mlp(self.norm2(tokens))

    def formula(self, tokens: Extent) -> SiteFormula:
        """``N(3De + 3e²) + 2N²e`` for an MLP as wide as its tokens."""
        width = self.attn.proj.in_features
        hidden = Rational(self.mlp.fc1.out_features, width) * E
        return SiteFormula.of(
            "T2T", {N: tokens, D: self.attn.qkv.in_features, E: width},
            dense=N * (3 * D * E + E**2 + 2 * E * hidden), core=2 * N**2 * E, attention_map=N**2,
            normalization=self.norm_of_patches(), saved=D * N + 5 * E * N + N**2, moved=4 * E * N,
        )  # fmt: skip


class TokenPerformer(TokenLayer):
    """The token layer with random features (Choromanski et al. 2021, Performer): linear in the number of patches.

    The features are ``exp(w u - |u|^2 / 2) / sqrt(m)``. As the rows of ``w`` have length ``sqrt(m)`` and not
    ``sqrt(out_dim)``, they estimate ``softmax(q k / 2 - |k|^2 / 4)`` for ``kernel_ratio`` 1/2, not ``softmax(q k)``.

    Args:
        dim: channels of a patch.
        out_dim: channels of a token.
        kernel_ratio: features (m) over ``out_dim``.
        dropout: rate after each of the two residual branches, in training.
    """

    EPS = 1e-8

    def __init__(self, dim: int, out_dim: int, kernel_ratio: float = 0.5, dropout: float = 0.1) -> None:
        super().__init__()
        features = int(out_dim * kernel_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = nn.Linear(dim, 3 * out_dim)
        self.proj = nn.Linear(out_dim, out_dim)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = nn.Sequential(
            nn.Linear(out_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim), nn.Dropout(dropout)
        )
        self.w = nn.Parameter(torch.empty(features, out_dim), requires_grad=False)
        if not self.w.is_meta:
            nn.init.orthogonal_(self.w, gain=math.sqrt(features))

    def projection(self) -> nn.Linear:
        return self.kqv

    def mix(self, projected: Tensor) -> Tensor:
        key, query, value = projected.chunk(3, dim=-1)
        tokens = value + self.drop(self.proj(self._attend(query, key, value)))
        return tokens + self.mlp(self.norm2(tokens))

    def formula(self, tokens: Extent) -> SiteFormula:
        """``N(3De + 3e²) + N(4em + m)`` with m random features."""
        features, width = self.w.shape
        return SiteFormula.of(
            "T2T-p", {N: tokens, D: self.kqv.in_features, E: width, STATE: features},
            dense=N * (3 * D * E + 3 * E**2), core=N * (4 * E * STATE + STATE),
            normalization=self.norm_of_patches(), saved=D * N + 7 * E * N, moved=4 * E * N,
        )  # fmt: skip

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """In float32 at least: the features are exponentials, and their sums' guard is zero in half precision."""
        dtype, wide = query.dtype, accumulation_dtype(query.dtype)
        with autocast_off(query.device.type):
            query, key = self._features(query.to(wide)), self._features(key.to(wide))
            weighted = query @ (key.transpose(1, 2) @ value.to(wide))
            total = query @ key.sum(dim=1).unsqueeze(-1)
            return (weighted / (total + self.EPS)).to(dtype)

    def _features(self, tokens: Tensor) -> Tensor:
        exponent = tokens @ self.w.to(tokens.dtype).T - tokens.square().sum(dim=-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(self.w.shape[0])
