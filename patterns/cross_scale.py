"""Cross-scale embeddings in the place of patch stems and merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..cores.cross_scale import CrossScaleConv, CrossScalePatches
from ..cores.stem import GatherPatches
from ..errors import ArgumentError
from ..ir import Grid, Site, StemSite
from ..lift.values import shape_of
from ..modules.cross_scale import scale_widths
from ..targets import Conversion, Exactness, NotConvertible, Target, Weights, register_target
from .patch_stem import map_width, patch_geometry

KERNEL_SIZES = {2: (2, 4), 4: (4, 8, 16, 32), 16: (16, 32)}
"""By stride: CrossFormer's merges and its stem, and what a stem of 16 x 16 patches fits into."""


@register_target
@dataclass(frozen=True)
class CrossScale(Target):
    """Cross-scale embedding (Wang et al. 2022, CrossFormer): patches of several sizes about one centre.

    A filter goes into the middle of a larger kernel, where it does the same. Where a kernel is too small for it, the
    channels that lose least are cut to that kernel.

    Args:
        kernel_sizes: ascending, none smaller than the stride and each larger by an even number. None takes
            ``KERNEL_SIZES`` of each site's stride.
    """

    kernel_sizes: Sequence[int] | None = None
    name = "cross_scale"
    kinds = ("stem",)

    def __post_init__(self) -> None:
        sizes = self.kernel_sizes
        if sizes is None:
            return
        numbers = isinstance(sizes, tuple | list) and all(type(size) is int and size > 0 for size in sizes)
        if not numbers or not sizes or list(sizes) != sorted(set(sizes)):
            raise ArgumentError(f"kernel_sizes: expected ascending numbers, got {sizes!r}")

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, StemSite)
        if len({*site.kernel}) > 1 or len({*site.stride}) > 1 or len({*site.padding}) > 1:
            raise NotConvertible("its patches are not square, and cross-scale kernels are; leave it with `keep`")
        kernels = self._kernels(site)
        if site.patches is None:
            return _convolution(site, kernels, weights)
        return _merge(site, kernels, weights)

    def _kernels(self, site: StemSite) -> tuple[int, ...]:
        stride = site.stride[0]
        kernels = tuple(KERNEL_SIZES.get(stride, ()) if self.kernel_sizes is None else self.kernel_sizes)
        if not kernels:
            raise NotConvertible(
                f"no kernels are known for stride {stride}; give kernel_sizes=({stride}, {2 * stride})"
            )
        if any(size < stride or (size - stride) % 2 for size in kernels):
            raise NotConvertible(
                f"kernels {kernels} do not share the centre of a {stride}x{stride} patch; take sizes from {stride} on, "
                "by even differences"
            )
        if site.out_channels % 2 ** (len(kernels) - 1):
            raise NotConvertible(
                f"{site.out_channels} channels cannot be shared out by halves among {len(kernels)} kernels; "
                "give fewer kernel_sizes"
            )
        return kernels


def _convolution(site: StemSite, kernels: tuple[int, ...], weights: Weights) -> Conversion:
    kernel, stride, padding = site.kernel[0], site.stride[0], site.padding[0]
    weight = weights(site.weight).detach()
    shares = _shares(weight, kernels, stride, padding)
    given = torch.cat([share.channels for share in shares])
    order = None if torch.equal(given.cpu(), torch.arange(len(given))) else given.argsort()
    core = CrossScaleConv(site.in_channels, site.out_channels, kernels, kernel, stride, padding, order).to(weight)
    _fill(core.projs, shares, site, weights)
    return _conversion(core, shares, weight, kernels)


def _merge(site: StemSite, kernels: tuple[int, ...], weights: Weights) -> Conversion:
    assert site.patches is not None
    side, sequence = site.kernel[0], len(shape_of(site.source)) == 3
    geometry = patch_geometry(site.patches, site.kernel, map_width(site.source))
    assert geometry is not None, "a merge is recognised by its geometry"
    sides, order = geometry
    weight = weights(site.weight).detach()
    filters = weight.unflatten(1, (side * side, -1))[:, torch.tensor(order).argsort()]  # the places row by row
    filters = filters.movedim(1, 2).unflatten(2, (side, side))
    shares = _shares(filters, kernels, side, 0)
    core = CrossScalePatches(
        GatherPatches(site.kernel, order, sides, flat=False),
        site.in_channels, site.out_channels, kernels,
        _norm(site.norm_node, weights, weight),
        Grid(*sides) if sequence else None,
    ).to(weight)  # fmt: skip
    _fill(core.projs, shares, site, weights)
    return _conversion(core, shares, filters, kernels)


@dataclass(frozen=True)
class _Share:
    """The ``channels`` that one kernel makes, their ``filters``, and the squared weight that does not fit into it."""

    channels: Tensor
    filters: Tensor
    lost: float


def _shares(weight: Tensor, kernels: tuple[int, ...], stride: int, padding: int) -> list[_Share]:
    """Small kernels first take the channels that lose least by them."""
    rest = torch.arange(len(weight), device=weight.device)
    shares = []
    for size, width in zip(kernels, scale_widths(len(weight), len(kernels)), strict=True):
        filters, lost = _centred(weight, size, (size - stride) // 2 - padding)
        taken = lost[rest].argsort(stable=True)[:width].sort().values
        channels = rest[taken]
        shares.append(_Share(channels, filters[channels], float(lost[channels].sum())))
        rest = rest[~torch.isin(rest, channels)]
    return shares


def _centred(weight: Tensor, size: int, offset: int) -> tuple[Tensor, Tensor]:
    """``[channels, in, size, size]`` filters, begun at place ``offset``, and the squared weight that each loses."""
    first, last = max(0, -offset), min(weight.shape[-1], size - offset)
    inside, place = slice(first, last), slice(first + offset, last + offset)
    filters = weight.new_zeros(*weight.shape[:2], size, size)
    filters[..., place, place] = weight[..., inside, inside]
    outside = weight.clone()
    outside[..., inside, inside] = 0
    return filters, outside.square().sum((1, 2, 3))


def _fill(convs: nn.ModuleList, shares: list[_Share], site: StemSite, weights: Weights) -> None:
    bias = None if site.bias is None else weights(site.bias)
    with torch.no_grad():
        for conv, share in zip(convs, shares, strict=True):
            conv.weight.copy_(share.filters)  # type: ignore[operator]
            conv.bias.copy_(torch.zeros_like(conv.bias) if bias is None else bias[share.channels])  # type: ignore


def _norm(node: Node | None, weights: Weights, like: Tensor) -> nn.LayerNorm | None:
    """A layer norm of its own with the values of a captured one, in the dtype of ``like``."""
    if node is None:
        return None
    shape, weight, bias = (*node.args[1:4], None, None)[:3]
    eps: Any = node.args[4] if len(node.args) > 4 else 1e-5
    made = nn.LayerNorm(shape, eps).to(like)
    with torch.no_grad():
        for own, given in ((made.weight, weight), (made.bias, bias)):
            if isinstance(given, Node):
                own.copy_(weights(given))
    return made


def _conversion(core: nn.Module, shares: list[_Share], weight: Tensor, kernels: tuple[int, ...]) -> Conversion:
    new, old = sum(share.filters.numel() for share in shares), weight.numel()
    benefit = f"none at once: {new / old:.1f} times the multiplications"
    cut = [(len(share.channels), size) for share, size in zip(shares, kernels, strict=True) if share.lost]
    if not cut:
        why = f"every filter lies inside its kernel, of {', '.join(map(str, kernels))}"
        return Conversion(Exactness.EXACT, why, core, {"kernel_sizes": kernels}, benefit, whole=True)
    count, sizes = sum(channels for channels, _ in cut), " and ".join(str(size) for _, size in cut)
    kept = 1 - sum(share.lost for share in shares) / float(weight.square().sum())
    return Conversion(
        Exactness.PROJECTED, f"{count} of {len(weight)} filters are cut to kernels of {sizes}", core,
        {"kernel_sizes": kernels, "kept_weight": round(kept, 6)}, benefit, whole=True,
    )  # fmt: skip
