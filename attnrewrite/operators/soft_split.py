"""Soft split (T2T-ViT, Yuan et al. 2021): a linear map of overlapping patches, normalized or not, without the patches.

``linear(norm(unfold(image)))`` for every patch. ``unfold`` repeats every pixel once for each patch that holds it
(147/48 times for 7 x 7 patches 4 apart). A linear map of patches is a convolution; one of layer-normalized patches is a
convolution and the patches' statistics, which are box filters. Patch channels are ordered as ``torch.nn.Unfold`` orders
them: channel, then row, then column.

The function here is plain torch operations, for any device, layout and floating dtype, of any order of differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.precision import accumulation_dtype, autocast_off


@dataclass(frozen=True)
class PatchGrid:
    """Side, distance and zero padding of square patches, in pixels. All may be symbols of whole numbers in costs."""

    kernel_size: int
    stride: int
    padding: int

    def cells(self, side: int) -> int:
        """Number of patches along an axis of so many pixels."""
        return (side + 2 * self.padding - self.kernel_size) // self.stride + 1

    def macs(self, cells: int, channels: int, out_channels: int) -> int:
        """Multiply-accumulates for so many patches of an image of so many channels, without a norm."""
        return cells * channels * self.kernel_size**2 * out_channels


@dataclass(frozen=True)
class PatchNorm:
    """Layer norm over the ``C * kernel_size ** 2`` values of a patch: factors, offsets, and what guards the root."""

    weight: Tensor
    bias: Tensor
    eps: float


def soft_split(
    image: Tensor, weight: Tensor, bias: Tensor | None, patches: PatchGrid, norm: PatchNorm | None = None
) -> Tensor:
    """Project every patch.

    Args:
        image: ``[B, C, H, W]``, any floating dtype.
        weight, bias: ``[out, C * kernel_size ** 2]`` and ``[out]``.
        patches: the patches.
        norm: of a patch before the map; then the arithmetic is in float32 at least, also under autocast.

    Returns:
        ``[B, H', W', out]``, contiguous, as fused attention needs it; with a norm in the dtype of ``weight``.
    """
    if norm is None:
        projected = F.conv2d(image, _filters(weight, patches), bias, patches.stride, patches.padding)
        return projected.permute(0, 2, 3, 1).contiguous()
    with autocast_off(image.device.type):
        return _project_normalized(image, weight, bias, patches, norm).to(weight.dtype)


def _project_normalized(
    image: Tensor, weight: Tensor, bias: Tensor | None, patches: PatchGrid, norm: PatchNorm
) -> Tensor:
    """In float32 at least: a patch's own contrast may be far smaller than its values.

    Filters of zero sum need no mean to be taken off. Neither the result nor a variance changes if one value is taken
    off all pixels, padding included; with the image's mean taken off, the variance as ``E[x^2] - E[x]^2`` loses less.
    """
    wide = accumulation_dtype(torch.promote_types(image.dtype, weight.dtype))
    scale, offset, weight = norm.weight.to(wide), norm.bias.to(wide), weight.to(wide)
    filters = weight * scale
    filters = filters - filters.mean(1, keepdim=True)
    constant = weight @ offset
    if bias is not None:
        constant = constant + bias.to(wide)

    padded = F.pad(image.to(wide), (patches.padding,) * 4)
    centered = padded - padded.mean((1, 2, 3), keepdim=True)
    mean = F.avg_pool2d(centered.mean(1, keepdim=True), patches.kernel_size, patches.stride)
    square = F.avg_pool2d(centered.square().mean(1, keepdim=True), patches.kernel_size, patches.stride)
    deviation = ((square - mean.square()).clamp_min(0) + norm.eps).sqrt()
    projected = F.conv2d(centered, _filters(filters, patches), stride=patches.stride) / deviation
    return projected.permute(0, 2, 3, 1).contiguous() + constant


def _filters(weight: Tensor, patches: PatchGrid) -> Tensor:
    return weight.unflatten(1, (-1, patches.kernel_size, patches.kernel_size))
