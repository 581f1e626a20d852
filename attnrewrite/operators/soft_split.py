"""The operator ``attnrewrite::soft_split`` (T2T-ViT, Yuan et al. 2021): a linear map of overlapping patches, normalized
or not, without the patches.

``linear(norm(unfold(image)))`` for every patch. ``unfold`` repeats every pixel once for each patch that holds it
(147/48 times for 7 x 7 patches 4 apart). A linear map of patches is a convolution; one of layer-normalized patches is a
convolution and the patches' statistics, which are box filters. Patch channels are ordered as ``torch.nn.Unfold`` orders
them: channel, then row, then column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..numerics.precision import accumulation_dtype, autocast_off
from .checks import check_both, check_shape
from .operator import Operator
from .problem import Problem


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
class SoftSplitProblem(Problem):
    """One call.

    Attributes:
        image: ``[B, C, H, W]``.
        weight, bias: ``[out, C * kernel_size ** 2]`` and ``[out]``.
        norm_weight, norm_bias: ``[C * kernel_size ** 2]``, factors and offsets of a layer norm of every patch before
            the map; then the arithmetic is in float32 at least, also under autocast.
        kernel_size, stride, padding: of the patches, in pixels.
        eps: guards the root of the norm.

    The result is ``[B, H', W', out]``, with a norm in the dtype of ``weight``.
    """

    name = "soft_split"
    results = ("output",)
    records_plain = True
    image: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    kernel_size: int
    stride: int
    padding: int
    eps: float

    @property
    def patches(self) -> PatchGrid:
        return PatchGrid(self.kernel_size, self.stride, self.padding)

    def autocast(self) -> Self:
        return self if self.norm_weight is not None else super().autocast()

    def check(self) -> None:
        if self.image.dim() != 4 or not self.image.is_floating_point():
            shape = tuple(self.image.shape)
            raise ArgumentError(f"image: must be a floating [B, C, H, W], got {self.image.dtype} {shape}")
        if self.kernel_size < 1 or self.stride < 1 or self.padding < 0:
            sizes = f"{self.kernel_size}, {self.stride} and {self.padding}"
            raise ArgumentError(f"kernel_size, stride, padding: must be at least 1, 1 and 0, got {sizes}")
        numbers = self.image.shape[1] * self.kernel_size**2
        check_shape("weight", self.weight, (self.weight.shape[0], numbers))
        check_shape("bias", self.bias, (self.weight.shape[0],))
        check_both("norm_weight", self.norm_weight, "norm_bias", self.norm_bias)
        check_shape("norm_weight", self.norm_weight, (numbers,))
        check_shape("norm_bias", self.norm_bias, (numbers,))
        if self.norm_weight is None:
            self.check_alike()

    def empty_results(self) -> tuple[Tensor]:
        like = self.image if self.norm_weight is None else self.weight
        return (like.new_empty(self.image.shape[0], *self._cells(), self.weight.shape[0]),)

    def macs(self) -> int:
        """The linear map's."""
        rows, columns = self._cells()
        batch, channels = self.image.shape[:2]
        return batch * self.patches.macs(rows * columns, channels, self.weight.shape[0])

    def backward_macs(self) -> int:
        """The gradients of image and weight."""
        return 2 * self.macs()

    def plain(self) -> tuple[Tensor]:
        if self.norm_weight is None or self.norm_bias is None:
            filters = _filters(self.weight, self.patches)
            projected = F.conv2d(self.image, filters, self.bias, self.stride, self.padding)
            return (projected.permute(0, 2, 3, 1).contiguous(),)  # as fused attention needs it
        with autocast_off(self.image.device.type):
            norm = (self.norm_weight, self.norm_bias, self.eps)
            projected = _project_normalized(self.image, self.weight, self.bias, self.patches, *norm)
            return (projected.to(self.weight.dtype),)

    def _cells(self) -> tuple[int, int]:
        height, width = self.image.shape[2:]
        return self.patches.cells(height), self.patches.cells(width)


def _project_normalized(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patches: PatchGrid,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """In float32 at least: a patch's own contrast may be far smaller than its values.

    Filters of zero sum need no mean to be taken off. Neither the result nor a variance changes if one value is taken
    off all pixels, padding included; with the image's mean taken off, the variance as ``E[x^2] - E[x]^2`` loses less.
    """
    wide = accumulation_dtype(torch.promote_types(image.dtype, weight.dtype))
    scale, offset, weight = norm_weight.to(wide), norm_bias.to(wide), weight.to(wide)
    filters = weight * scale
    filters = filters - filters.mean(1, keepdim=True)
    constant = weight @ offset
    if bias is not None:
        constant = constant + bias.to(wide)

    padded = F.pad(image.to(wide), (patches.padding,) * 4)
    centered = padded - padded.mean((1, 2, 3), keepdim=True)
    mean = F.avg_pool2d(centered.mean(1, keepdim=True), patches.kernel_size, patches.stride)
    square = F.avg_pool2d(centered.square().mean(1, keepdim=True), patches.kernel_size, patches.stride)
    deviation = ((square - mean.square()).clamp_min(0) + eps).sqrt()
    projected = F.conv2d(centered, _filters(filters, patches), stride=patches.stride) / deviation
    return projected.permute(0, 2, 3, 1).contiguous() + constant


def _filters(weight: Tensor, patches: PatchGrid) -> Tensor:
    return weight.unflatten(1, (-1, patches.kernel_size, patches.kernel_size))


SOFT_SPLIT = Operator(SoftSplitProblem)
