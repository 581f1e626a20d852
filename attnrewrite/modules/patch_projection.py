"""Linear maps of overlapping patches, without the patches.

``unfold`` repeats every pixel once for each patch that holds it (147/48 times for 7 x 7 patches 4 apart). A linear map
of patches is a convolution; one of layer-normalised patches is a convolution and the patches' statistics, which are
box filters. Patch channels are ordered as ``torch.nn.Unfold`` orders them: channel, then row, then column.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics.precision import accumulation_dtype


class PatchGrid(NamedTuple):
    """Side, distance and zero padding of square patches, in pixels."""

    kernel_size: int
    stride: int
    padding: int


def autocast_off(device: str) -> AbstractContextManager[None]:
    """For what keeps its own precision; devices without autocast (meta) refuse to be asked."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def project_patches(image: Tensor, norm: nn.Module, linear: nn.Linear, patches: PatchGrid) -> Tensor:
    """``linear(norm(patch))`` for every patch of an image.

    Args:
        image: ``[B, C, H, W]``.
        norm: ``nn.LayerNorm`` over a patch's ``C * kernel_size ** 2`` values, or ``nn.Identity``.
        linear: from those values.
        patches: the patches.

    Returns:
        ``[B, H', W', linear.out_features]``, contiguous, as fused attention needs it, in the dtype of the weights
        (also under autocast).
    """
    if not isinstance(norm, nn.LayerNorm):
        projected = F.conv2d(image, _filters(linear.weight, patches), linear.bias, patches.stride, patches.padding)
        return projected.permute(0, 2, 3, 1).contiguous()
    with autocast_off(image.device.type):
        return _project_normalized(image, norm, linear, patches).to(linear.weight.dtype)


def _project_normalized(image: Tensor, norm: nn.LayerNorm, linear: nn.Linear, patches: PatchGrid) -> Tensor:
    """In float32 at least: a patch's own contrast may be far smaller than its values.

    Filters of zero sum need no mean to be taken off. Neither the result nor a variance changes if one value is taken
    off all pixels, padding included; with the image's mean taken off, the variance as ``E[x^2] - E[x]^2`` loses less.
    """
    wide = accumulation_dtype(torch.promote_types(image.dtype, linear.weight.dtype))
    scale, offset = norm.weight.to(wide), norm.bias.to(wide)
    weight = linear.weight.to(wide)
    filters = weight * scale
    filters = filters - filters.mean(1, keepdim=True)
    constant = weight @ offset
    if linear.bias is not None:
        constant = constant + linear.bias.to(wide)

    padded = F.pad(image.to(wide), (patches.padding,) * 4)
    centred = padded - padded.mean((1, 2, 3), keepdim=True)
    mean = F.avg_pool2d(centred.mean(1, keepdim=True), patches.kernel_size, patches.stride)
    square = F.avg_pool2d(centred.square().mean(1, keepdim=True), patches.kernel_size, patches.stride)
    deviation = ((square - mean.square()).clamp_min(0) + norm.eps).sqrt()
    projected = F.conv2d(centred, _filters(filters, patches), stride=patches.stride) / deviation
    return projected.permute(0, 2, 3, 1).contiguous() + constant


def _filters(weight: Tensor, patches: PatchGrid) -> Tensor:
    return weight.unflatten(1, (-1, patches.kernel_size, patches.kernel_size))
