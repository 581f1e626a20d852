"""How the papers' modules, which take maps or images, run where a site has tokens, or channels first."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ir.sites import Grid
from .conv_gate import on_map
from .sequence import grid_of, join_map, split_map

Operator = Callable[..., Tensor]


def on_tokens(operator: Operator, tokens: Tensor, height: int, width: int, prefix_tokens: int = 0) -> Tensor:
    """An operator of channels-last maps on ``[B, prefix + H * W, C]``; a prefix token is a map of one pixel.

    ``height`` and ``width`` are of the map at conversion; other maps keep its aspect ratio.
    """
    return on_map(operator, Grid(height, width, prefix_tokens), tokens)


def beside_prefix(operator: Operator, tokens: Tensor, height: int, width: int, prefix_tokens: int) -> Tensor:
    """An operator that takes a map and the prefix tokens, and returns both, on ``[B, prefix + H * W, C]``."""
    prefix, image = split_map(tokens, grid_of(tokens.shape[1], Grid(height, width, prefix_tokens)))
    image, prefix = operator(image, prefix)
    return join_map(prefix, image)


def map_to_tokens(operator: Operator, source: Tensor) -> Tensor:
    """An operator of channels-last maps; its result ``[B, H * W, C]``."""
    return operator(source).flatten(1, 2)


def patches_to_image(operator: Operator, image: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """An operator from images to channels-last maps of a ``stride``-th of their sides, as a convolution of
    ``kernel_size`` and ``padding``: channels first, and as many tokens."""
    return _patches(operator, image, kernel_size, stride, padding).permute(0, 3, 1, 2)


def patches_to_map(operator: Operator, image: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """As ``patches_to_image``, with channels last."""
    return _patches(operator, image, kernel_size, stride, padding)


def patches_to_tokens(operator: Operator, image: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """As ``patches_to_image``, ``[B, H' * W', C]``."""
    return _patches(operator, image, kernel_size, stride, padding).flatten(1, 2)


def merge_of_image(operator: Operator, image: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """As ``patches_to_image``, for an operator from channels-last maps."""
    return patches_to_image(lambda part: operator(part.permute(0, 2, 3, 1)), image, kernel_size, stride, padding)


def _patches(operator: Operator, image: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    rows, columns = ((side + 2 * padding - kernel_size) // stride + 1 for side in image.shape[-2:])
    below, right = rows * stride - image.shape[-2], columns * stride - image.shape[-1]
    image = F.pad(image, (0, torch.sym_max(right, 0), 0, torch.sym_max(below, 0)))
    return operator(image)[:, :rows, :columns]
