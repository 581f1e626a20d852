"""Log-spaced continuous position bias (Liu et al. 2022, Swin Transformer V2) from pixels to cells of a pooled map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..numerics.precision import autocast_dtype
from .adaptive_pool import cell_bounds

Size = tuple[int, int]
REACH = 8
"""The side of the map in pretraining is stretched to this length; logarithms are taken to this base."""


def log_cpb(fc1: nn.Module, fc2: nn.Module, pixels: Size, cells: Size, pretrain: Size) -> Tensor:
    """``fc2(ReLU(fc1(log-spaced offset of pixel from cell)))`` for all pairs, ``[heads, H * W, rows * columns]``.

    The network runs once for each offset that occurs, and not for each pair: offsets are multiples of a step along
    both axes, so that the place of a pair in the table of offsets is known in closed form, an axis at a time.

    Args:
        fc1, fc2: 2 to hidden to heads channels.
        pixels: ``H, W`` of the queries' map.
        cells: rows and columns of the keys' map, which is ``adaptive_average`` of the other.
        pretrain: the queries' map in pretraining; it sets the unit of length.
    """
    weight = next(fc1.parameters())
    (vertical, rows), (horizontal, columns) = (
        _axis(side, cut, unit, weight) for side, cut, unit in zip(pixels, cells, pretrain, strict=True)
    )
    offsets = torch.stack(torch.meshgrid(vertical, horizontal, indexing="ij"), dim=-1).to(weight.dtype)
    table = fc2(F.relu(fc1(offsets))).permute(2, 0, 1)
    pairs = table[:, rows][..., columns]  # [heads, H, rows, W, columns]
    return pairs.transpose(2, 3).flatten(3).flatten(1, 2)


def resample_bias(bias: Tensor, pixels: Size, cells: Size, new_pixels: Size, new_cells: Size) -> Tensor:
    """A bias ``[heads, H * W, rows * columns]`` for other sizes: bilinear between cells, then between pixels."""
    by_axis = bias.unflatten(2, cells).unflatten(1, pixels)
    for axis, (old, new) in enumerate(zip((*pixels, *cells), (*new_pixels, *new_cells), strict=True), start=1):
        by_axis = torch.tensordot(by_axis, _bilinear(old, new, bias), dims=([axis], [1])).movedim(-1, axis)
    return by_axis.flatten(3).flatten(1, 2)


def _bilinear(old: int, new: int, like: Tensor) -> Tensor:
    """``[new, old]``: how much of each old sample goes to each new one; the outermost ones reach to the border."""
    center = (torch.arange(new, device=like.device, dtype=torch.float64) + 0.5) * old / new - 0.5
    distance = center.clamp(0, old - 1)[:, None] - torch.arange(old, device=like.device)
    return (1 - distance.abs()).clamp_min(0).to(like.dtype)


def _axis(side: int, cells: int, pretrain: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Log-spaced offsets ``[offsets]``, and which of them each pixel has to each cell, ``[side, cells]``."""
    start, end = cell_bounds(side, cells, like.device)
    # In half pixels, as the center of a cell may lie between two.
    half_pixels = 2 * torch.arange(side, device=like.device)[:, None] - (start + end - 1)
    furthest, step = _offset_range(side, cells)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    offset = (torch.arange(2 * furthest // step + 1, device=like.device) * step - furthest).to(dtype) / 2
    stretched = offset * REACH / max(pretrain - 1, 1)
    logarithm = stretched.sign() * torch.log1p(stretched.abs()) / math.log(REACH)
    return logarithm, (half_pixels + furthest) // step


def _offset_range(side: int, cells: int) -> tuple[int, int]:
    """The largest offset along an axis, to both sides, and the step between offsets, in half pixels."""
    if statically_known_true(side % cells == 0):
        return 2 * side - 1 - side // cells, 2
    if not (isinstance(side, int) and isinstance(cells, int)):
        return 2 * side - 2, 1  # not all of them occur, but these are sizes that can be reasoned about symbolically
    doubled_centers = [cell * side // cells - (-(cell + 1) * side // cells) - 1 for cell in range(cells)]
    alike = len({center % 2 for center in doubled_centers}) == 1
    return doubled_centers[-1], 2 if alike else 1


class _Kept(NamedTuple):
    key: tuple[object, ...]
    weights: list[Tensor]
    bias: Tensor


class BiasCache:
    """The last bias that was computed from some weights; copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> tuple[type[BiasCache], tuple[()]]:
        return BiasCache, ()

    def get(self, weights: Sequence[Tensor], sizes: tuple[int, ...], compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave last time if weights, sizes and autocast are as then.

        Only call it where no gradients are wanted. Weights that are not plain parameters (fakes of a compiler,
        functional calls) are never remembered.
        """
        if torch.compiler.is_compiling() or any(type(weight) is not nn.Parameter for weight in weights):
            return compute()
        key = (sizes, autocast_dtype(weights[0].device.type), *map(_stamp, weights))
        kept = self._kept
        if kept is not None and kept.key == key and _same_values(kept.weights, weights):
            return kept.bias
        bias = compute()
        if type(bias) is Tensor:
            self._kept = _Kept(key, [weight.detach().clone() for weight in weights], bias)
        return bias


def _stamp(weight: Tensor) -> tuple[object, ...]:
    version = 0 if weight.is_inference() else weight._version
    return weight.device, weight.dtype, weight.data_ptr(), version


def _same_values(kept: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Writes through ``.data`` leave no stamp. Elsewhere than on a CPU the comparison would have to wait."""
    return weights[0].device.type != "cpu" or all(map(torch.equal, kept, weights))
