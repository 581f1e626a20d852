"""Aggregated and pixel-focused attention (Shi 2024, TransNeXt, sections 3.1 and 3.2), for maps of any size."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from sympy import Expr, Integer, Max, expand, sqrt
from torch import Tensor, nn

from ..algebra.module_formula import CostedCall
from ..algebra.site_formula import C, Extent, K, N, P, SiteFormula, h
from ..algebra.symbols import down, offsets
from ..errors import ArgumentError
from ..ir.heads import as_pair
from ..operators.aggregated_attention import (
    AggregatedGeometry,
    AggregatedProblem,
    LearnedTokens,
    LocalKeys,
    SharedKeys,
    aggregated_attention,
)
from ..operators.index_rule import window_on_map
from .adaptive_pool import adaptive_average
from .cosine_attention import LengthScaledAttention, ScoreOptions
from .heads import widths_of
from .initialization import initialize
from .log_cpb import Size


class AggregatedAttention(LengthScaledAttention):
    """Every pixel attends to its window and to a pooled map, in one softmax; its affinity to learned tokens adds to
    its window's weights: ``(softmax(scores) + [unit query . learnable_tokens + learnable_bias, 0]) value``.

    The window is cut off at the border of the map. Pixel-focused attention is ``qk_norm=False,
    scale=head_dim ** -0.5, length_scale=False, query_embedding=False, learnable_tokens=False``.

    Args:
        dim, num_heads, position_bias, options: of ``LengthScaledAttention``.
        window_size: side of the window, odd; it may exceed the map.
        sr_ratio: pixels per side, or (rows, columns), that a cell of the pooled map stands for; the pooled map has
            ``side // sr_ratio`` cells, at least one; two at least where it is exported with sides that are not known.
        pool_size: cells of the pooled map, a side or (rows, columns), for maps of any size, instead of ``sr_ratio``.
        pool: whether there is a pooled map; without it and a position bias this is attention in windows.
        reducer: what makes the pooled map ``[B, rows, columns, dim]`` of the map ``[B, H, W, dim]``; None is linear map
            (``sr``), GELU, adaptive average pooling, layer norm (``norm``). The other one's sizes are then its own.
        learnable_tokens: whether there are tokens, and a bias, for the weights after the softmax.
        qkv_bias: whether the projections to queries, keys and values have a bias.

    The window's bias ``relative_pos_bias_local`` ``[heads, window_size ** 2]`` is a free table, of places in the order
    of ``local_window``; with ``-inf`` in it, those places take part after the softmax only.

    Raises:
        ArgumentError: for arguments that do not fit each other.
    """

    costed_call = CostedCall(counted_by_formula=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 3,
        sr_ratio: int | Size | None = None,
        pool_size: int | Size | None = None,
        pool: bool = True,
        reducer: nn.Module | None = None,
        learnable_tokens: bool = True,
        qkv_bias: bool = True,
        position_bias: bool = True,
        **options: Unpack[ScoreOptions],
    ) -> None:
        super().__init__(dim, num_heads, position_bias=position_bias and pool, **options)
        if window_size < 1 or window_size % 2 == 0:
            raise ArgumentError(f"window_size: must be odd, so that the window has a center, got {window_size}")
        if self.interpolate_bias and reducer is not None:
            raise ArgumentError("interpolate_bias: the reducer's map at the pretraining size is unknown; leave it out")
        self.window_size, self.pool = window_size, pool
        self.sr_ratio, self.pool_size = _pooling(sr_ratio, pool_size, pool, reducer)
        places = window_size**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.relative_pos_bias_local = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, places), std=0.0004))
        self.learnable_tokens = self.learnable_bias = self.sr = self.norm = None
        if learnable_tokens:
            tokens = torch.empty(num_heads, dim // num_heads, places)
            self.learnable_tokens = nn.Parameter(nn.init.trunc_normal_(tokens, std=0.02))
            self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, places))
        if pool and reducer is None:
            self.sr = nn.Conv2d(dim, dim, 1)
            self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.apply(initialize)
        self.reducer = reducer  # last, for its weights are its own

    def forward(
        self, source: Tensor, prefix: Tensor | None = None, local_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend on a map.

        Args:
            source: ``[B, H, W, dim]``.
            prefix: tokens that lie on no map (class or register tokens), ``[B, tokens, dim]``. Every pixel sees them,
                in the same softmax, and they see all pixels and each other.
            local_mask: ``[H * W, window_size ** 2]``, true where a pixel sees a place of its window; None is all. Each
                pixel must see some key, in the window or elsewhere.

        Returns:
            A map like ``source``; with a prefix, the map and tokens like the prefix.

        Raises:
            ArgumentError: for a mask of another shape, or one that leaves a pixel without a key.
        """
        pixels = (source.shape[1], source.shape[2])
        tokens = source.flatten(1, 2)
        query = self.unit(self.heads(self.q(tokens)))
        key, value = self._keys(tokens)
        seen = window_on_map(*pixels, self.window_size, source.device)
        shared = self._shared_keys(source, prefix)
        if local_mask is not None:
            seen = seen & self._checked(local_mask, seen, shared is None)
        scaled = self.scaled_query(query, seen.sum(-1) + (0 if shared is None else shared.key.shape[1]))
        scaled, query, own_key, own_value = (
            part.transpose(1, 2).unflatten(1, pixels) for part in (scaled, query, key, value)
        )
        hidden = None if local_mask is None else seen
        window = LocalKeys(own_key, own_value, self.window_size, self.relative_pos_bias_local, hidden)
        learned = self._learned(query, masked=local_mask is not None)
        rate = self.attn_drop.p if self.attn_drop.training else 0.0
        mixed = aggregated_attention(AggregatedProblem(scaled, window, shared, learned, rate))
        result = self.project(mixed.flatten(1, 2).transpose(1, 2).to(value.dtype)).unflatten(1, pixels)
        return result if prefix is None else (result, self._attend_prefix(prefix, key, value))

    def key_grid(self, pixels: Size) -> Size:
        """Cells of the pooled map; not for a ``reducer`` of the user's own."""
        if self.pool_size is not None:
            return self.pool_size
        assert self.sr_ratio is not None
        rows, columns = (torch.sym_max(side // ratio, 1) for side, ratio in zip(pixels, self.sr_ratio, strict=True))
        return rows, columns

    def formula(self, height: Extent, width: Extent) -> SiteFormula | None:
        """k² neighbors and P pooled cells in one softmax, and with learned tokens a third ``Nk²C``:
        ``5NC² + 2PC² + 2NPC + 3Nk²C``. Without them it is pixel-focused attention, ``2Nk²C``. None without a pooled
        map, with a reducer of the user's own, and where the position bias is resampled."""
        if not self.pool or self.reducer is not None or self.interpolate_bias:
            return None
        rows, columns = self._cells(height, width)
        widths, learned = widths_of(self.proj, self.num_heads), self.learnable_tokens is not None
        a, weights = widths.inner, h * N * (K + P)
        products = AggregatedGeometry(N, 1, 1, a, a, window_size=sqrt(K), shared_keys=P, learned=learned)
        formula = SiteFormula.of(
            "AA" if learned else "PFA",
            {N: height * width, P: rows * columns, K: self.window_size**2, **widths.symbols},
            dense=5 * N * C * a + 2 * P * C * a, core=expand(products.macs()), normalization=N * a,
            attention_map=weights, saved=C * N + 4 * a * N + 2 * a * P + weights, moved=4 * a * N + 2 * a * P,
            streams=2 * C * N + 6 * a * N + C * P + 2 * a * P, weights=5 * C * a,
        )  # fmt: skip
        return self.with_position_bias(formula, offsets(height, rows) * offsets(width, columns))

    def _cells(self, height: Extent, width: Extent) -> tuple[Expr, Expr]:
        """``key_grid`` for costs."""
        if self.pool_size is not None:
            return Integer(self.pool_size[0]), Integer(self.pool_size[1])
        assert self.sr_ratio is not None
        rows, columns = (
            Max(1, down(side, Integer(ratio))) for side, ratio in zip((height, width), self.sr_ratio, strict=True)
        )
        return rows, columns

    def _keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit keys and values ``[B, heads, tokens, head_dim]`` of ``[B, tokens, C]``."""
        key, value = map(self.heads, self.kv(tokens).chunk(2, dim=-1))
        return self.unit(key), value

    def _learned(self, query: Tensor, masked: bool) -> LearnedTokens | None:
        if self.learnable_tokens is None or self.learnable_bias is None:
            return None
        return LearnedTokens(query, self.learnable_tokens, self.learnable_bias, follows_mask=masked)

    def _shared_keys(self, source: Tensor, prefix: Tensor | None) -> SharedKeys | None:
        pooled = self._pooled_keys(source) if self.pool else None
        if prefix is None:
            return pooled
        key, value = (part.transpose(1, 2) for part in self._keys(prefix))
        if pooled is None:
            return SharedKeys(key, value)
        bias = None if pooled.bias is None else F.pad(pooled.bias, (0, prefix.shape[1]))
        return SharedKeys(torch.cat([pooled.key, key], dim=1), torch.cat([pooled.value, value], dim=1), bias)

    def _pooled_keys(self, source: Tensor) -> SharedKeys:
        pixels = (source.shape[1], source.shape[2])
        if self.reducer is not None:
            pooled = self.reducer(source)
        else:
            assert self.sr is not None
            assert self.norm is not None
            activated = F.gelu(self.sr(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            pooled = self.norm(adaptive_average(activated, self.key_grid(pixels)))
        key, value = (part.transpose(1, 2) for part in self._keys(pooled.flatten(1, 2)))
        bias = self.position_bias(pixels, (pooled.shape[1], pooled.shape[2]))
        return SharedKeys(key, value, None if bias is None else bias.unflatten(1, pixels))

    def _attend_prefix(self, prefix: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Prefix tokens attend to all pixels, given by keys and values, and to each other."""
        own_key, own_value = self._keys(prefix)
        key, value = torch.cat([own_key, key], dim=2), torch.cat([own_value, value], dim=2)
        seen = torch.full((1,), key.shape[2], device=key.device)
        query = self.scaled_query(self.unit(self.heads(self.q(prefix))), seen)
        return self.project(self.dense(query, key, value, None))

    def _checked(self, local_mask: Tensor, seen: Tensor, alone: bool) -> Tensor:
        """The mask, if it is one for this map, and leaves each pixel a key where the window is ``alone``."""
        if local_mask.shape != seen.shape or local_mask.dtype != torch.bool:
            found = f"{tuple(local_mask.shape)}, {local_mask.dtype}"
            raise ArgumentError(f"local_mask: must be {tuple(seen.shape)}, torch.bool for this map, got {found}")
        if alone and not torch.compiler.is_compiling() and not bool((seen & local_mask).any(-1).all()):
            raise ArgumentError(
                "local_mask: leaves a pixel without a key; let it see at least one position of its window"
            )
        return local_mask

    def extra_repr(self) -> str:
        pooling = f"sr_ratio={self.sr_ratio}" if self.pool_size is None else f"pool_size={self.pool_size}"
        return f"{super().extra_repr()}, window_size={self.window_size}, {pooling if self.pool else 'pool=False'}"


def _pooling(
    sr_ratio: int | Size | None, pool_size: int | Size | None, pool: bool, reducer: nn.Module | None
) -> tuple[Size | None, Size | None]:
    """Ratio and size of the pooled map, of which there is one if the pooling is the module's own."""
    given = {"sr_ratio": sr_ratio, "pool_size": pool_size}
    named = [name for name, value in given.items() if value is not None]
    if not pool and (named or reducer is not None):
        raise ArgumentError(f"{named[0] if named else 'reducer'}: has no effect with pool=False; leave it out")
    if reducer is not None and named:
        raise ArgumentError(f"{named[0]}: the reducer determines the size of the pooled map; leave it out")
    if pool and reducer is None and len(named) != 1:
        raise ArgumentError(f"sr_ratio, pool_size: pass one of them, got {' and '.join(named) or 'none'}")
    sizes = {name: as_pair(value) for name, value in given.items() if value is not None}
    for name, size in sizes.items():
        if min(size) < 1:
            raise ArgumentError(f"{name}: must be at least 1, got {size}")
    return sizes.get("sr_ratio"), sizes.get("pool_size")
