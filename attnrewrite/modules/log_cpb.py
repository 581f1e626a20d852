"""Log-spaced continuous position bias (Liu et al. 2022, Swin Transformer V2) from pixels to cells of a pooled map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

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
        cells: rows and columns of the keys' map, which is `adaptive_average` of the other.
        pretrain: the queries' map in pretraining; it sets the unit of length.
    """
    weight = next(fc1.parameters())
    (vertical, rows), (horizontal, columns) = (
        _axis(side, cut, unit, weight) for side, cut, unit in zip(pixels, cells, pretrain, strict=True)
    )
    offsets = torch.stack(torch.meshgrid(vertical, horizontal, indexing="ij"), dim=-1).to(weight.dtype)
    table = fc2(F.relu(fc1(offsets))).permute(2, 0, 1)
    pairs = table.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    return pairs.unflatten(2, columns.shape).unflatten(1, rows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def resample_bias(bias: Tensor, pixels: Size, cells: Size, new_pixels: Size, new_cells: Size) -> Tensor:
    """A bias ``[heads, H * W, rows * columns]`` for other sizes: bilinear between cells, then between pixels."""
    by_cell = F.interpolate(bias.unflatten(2, cells), size=new_cells, mode="bilinear").flatten(2)
    by_pixel = F.interpolate(by_cell.transpose(1, 2).unflatten(2, pixels), size=new_pixels, mode="bilinear")
    return by_pixel.flatten(2).transpose(1, 2)


def _axis(side: int, cells: int, pretrain: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Log-spaced offsets ``[offsets]``, and which of them each pixel has to each cell, ``[side, cells]``."""
    start, end = cell_bounds(side, cells, like.device)
    # In half pixels, as the centre of a cell may lie between two; the cells lie symmetrically.
    half_pixels = 2 * torch.arange(side, device=like.device)[:, None] - (start + end - 1)
    furthest = 2 * side - 1 - (side + cells - 1) // cells
    step = 2 if _whole_steps(side, cells) else 1
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    offset = torch.arange(-furthest, furthest + 1, step, device=like.device).to(dtype) / 2
    stretched = offset * REACH / max(pretrain - 1, 1)
    logarithm = stretched.sign() * torch.log1p(stretched.abs()) / torch.log1p(stretched.new_tensor(REACH - 1.0))
    return logarithm, (half_pixels + furthest) // step


def _whole_steps(side: int, cells: int) -> bool:
    """Whether all offsets along an axis differ by whole pixels; for symbolic sizes, whether that is known."""
    if isinstance(side, int) and isinstance(cells, int):
        doubled_centres = (cell * side // cells - (-(cell + 1) * side // cells) - 1 for cell in range(cells))
        return len({centre % 2 for centre in doubled_centres}) == 1
    return statically_known_true(side % cells == 0)


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
        device = weights[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (sizes, autocast, *map(_stamp, weights))
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
