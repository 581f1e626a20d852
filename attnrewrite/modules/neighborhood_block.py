"""Neighborhood attention with its projections, and the blocks and stems of NAT and DiNAT.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; Hassani and Shi, "Dilated Neighborhood Attention
Transformer", 2022. Maps are channels-last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.formulas import neighborhood_attention as neighborhood_formula
from ..algebra.module_formula import CostedCall
from ..algebra.site_formula import Extent, SiteFormula
from ..errors import ArgumentError
from ..functional import neighborhood_attention
from .drop_path import DropPath
from .feed_forward import FeedForward
from .heads import require_heads, widths_of


class NeighborhoodAttention2d(nn.Module):
    """Attention of every token of a map to its neighborhood, with a relative position bias.

    The bias is looked up by key minus query, in steps of the dilation.

    Where the neighborhood does not fit a side of the map (``kernel_size * dilation`` above it), that axis has the
    largest kernel that does, at the same dilation: fewer keys, as far apart, with the bias that they were trained
    with. The map is never padded, so that no query attends to anything but tokens.

    Args:
        dim: channels in and out.
        num_heads: must divide ``dim``.
        kernel_size: keys per side, in tokens.
        dilation: distance of neighboring keys, in tokens.
        qkv_bias: whether query, key and value have a bias.
        scale: of the dot products; None is ``head_dim ** -0.5``.
        rel_pos_bias: False leaves out the bias.

    Raises:
        ArgumentError: if the heads do not divide the channels, or for a kernel or dilation below 1.
    """

    costed_call = CostedCall()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        scale: float | None = None,
        rel_pos_bias: bool = True,
    ) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
            if value < 1:
                raise ArgumentError(f"{name}: must be at least 1, got {value}")
        self.num_heads, self.kernel_size, self.dilation, self.scale = num_heads, kernel_size, dilation, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        table = nn.init.trunc_normal_(torch.empty(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1), std=0.02)
        self.rpb = nn.Parameter(table) if rel_pos_bias else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape."""
        query, key, value = self.qkv(source).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        height, width = (self._fitting(side) for side in source.shape[1:3])
        kernel_size, dilation = (height[0], width[0]), (height[1], width[1])
        mixed = neighborhood_attention(
            query, key, value, kernel_size, dilation, scale=self.scale, bias=self._bias(kernel_size)
        )
        assert isinstance(mixed, Tensor)
        return self.proj(mixed.flatten(-2))

    def formula(self, height: Extent, width: Extent) -> SiteFormula:
        """``4NC² + 2NKC`` for ``K`` keys in a kernel."""
        kernel, dilation = (self.kernel_size,) * 2, (self.dilation,) * 2
        return neighborhood_formula(height, width, 0, kernel, dilation, widths_of(self.proj, self.num_heads))

    def _fitting(self, side: int) -> tuple[int, int]:
        """Kernel size and dilation on an axis of so many tokens."""
        dilation = min(self.dilation, side)
        return min(self.kernel_size, side // dilation), dilation

    def _bias(self, kernel_size: tuple[int, int]) -> Tensor | None:
        """``[heads, 2k - 1, 2k - 1]``, the center of the table that these kernels reach."""
        table: Tensor | None = self.rpb
        if table is None:
            return None
        for axis, fitting in enumerate(kernel_size, start=1):
            if fitting < self.kernel_size:
                table = table.narrow(axis, self.kernel_size - fitting, 2 * fitting - 1)
        return table

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class NeighborhoodBlock(nn.Module):
    """Neighborhood attention and a feed-forward network, each normalized before and added to its input.

    Args:
        dim, num_heads, kernel_size, dilation, qkv_bias, scale: as in ``NeighborhoodAttention2d``.
        mlp_ratio: hidden channels of the feed-forward network over ``dim``.
        drop_path: rate of stochastic depth.
        layer_scale: initial value of trained factors on both branches; None is none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention2d(dim, num_heads, kernel_size, dilation, qkv_bias, scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1: nn.Parameter | None
        self.gamma2: nn.Parameter | None
        for name in ("gamma1", "gamma2"):
            self.register_parameter(
                name, None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            )

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape."""
        source = source + self.drop_path(_scaled(self.attn(self.norm1(source)), self.gamma1))
        return source + self.drop_path(_scaled(self.mlp(self.norm2(source)), self.gamma2))


def _scaled(branch: Tensor, factors: Tensor | None) -> Tensor:
    return branch if factors is None else branch * factors


class ConvTokenizer(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with nothing between, and layer norm: NAT's stem."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.proj = nn.Sequential(nn.Conv2d(in_chans, half, 3, 2, padding=1), nn.Conv2d(half, dim, 3, 2, padding=1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, H / 4, W / 4, dim]``, odd sides rounded up at each halving."""
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """A 3 x 3 convolution of stride 2 that doubles the channels, and layer norm: between NAT's levels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to ``[B, H / 2, W / 2, 2 * dim]``, odd sides rounded up."""
        return self.norm(self.reduction(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbedding(nn.Module):
    """A convolution of non-overlapping patches, and (``norm``) layer norm; images are padded to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, image: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, H / patch_size, W / patch_size, dim]``, rounded up."""
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size))
        patches = self.proj(image).permute(0, 2, 3, 1)
        return patches if self.norm is None else self.norm(patches)


class PatchMerging(nn.Module):
    """Swin's (Liu et al. 2021): 2 x 2 tokens into the channels, layer norm, a linear map to twice ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to ``[B, H / 2, W / 2, 2 * dim]``; odd sides are padded at their end with zeros."""
        source = F.pad(source, (0, 0, 0, source.shape[2] % 2, 0, source.shape[1] % 2))
        patches = source.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(patches.flatten(3)))
