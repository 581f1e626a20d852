"""Cross-scale embeddings in the place of patch stems and merges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ...cores.cross_scale import CrossScaleConv, CrossScalePatches
from ...cores.published import merge_of_image, patches_to_image, patches_to_map, patches_to_tokens
from ...cores.stem import GatherPatches
from ...errors import ArgumentError, Refusal
from ...graph.values import operator_name, shape_of
from ...ir.contract import Adapter, Conversion, Exactness, Target, Weights, WholeSite
from ...ir.sites import Site, StemSite
from ...modules.cross_scale import CrossScaleMerge, CrossScaleStem, scale_widths
from ..patch_geometry import map_width, patch_geometry
from ..published import Published, adapter_between
from ..site_geometry import require_one_of

Pair = tuple[int, int]
KERNEL_SIZES = {2: (2, 4), 4: (4, 8, 16, 32), 16: (16, 32)}
"""By stride: CrossFormer's merges and its stem, and what a stem of 16 x 16 patches fits into."""


@dataclass(frozen=True)
class CrossScale(Target):
    """Cross-scale embedding (Wang et al. 2022, CrossFormer): patches of several sizes about one center.

    A filter goes into the middle of a larger kernel, where it does the same. Where a kernel is too small for it, the
    channels that lose least are cut to that kernel.

    Args:
        kernel_sizes: ascending, none smaller than the stride and each larger by an even number. None takes
            ``KERNEL_SIZES`` of each site's stride.
        official: take the embedding as published: at stride 2 the merge, ``norm`` and ``reductions``, elsewhere the
            stem, ``projs`` and ``norm``. Channels keep their order, whatever a smaller kernel cuts off.
    """

    kernel_sizes: Sequence[int] | None = None
    official: bool = False
    name = "cross_scale"
    kinds = ("stem",)

    def __post_init__(self) -> None:
        require_one_of("official", self.official, (False, True))
        sizes = self.kernel_sizes
        if sizes is None:
            return
        numbers = isinstance(sizes, tuple | list) and all(type(size) is int and size > 0 for size in sizes)
        if not numbers or not sizes or list(sizes) != sorted(set(sizes)):
            raise ArgumentError(f"kernel_sizes: expected ascending numbers, got {sizes!r}")

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, StemSite)
        if len({*site.kernel}) > 1 or len({*site.stride}) > 1 or len({*site.padding}) > 1:
            raise Refusal("its patches are not square, but cross-scale kernels are")
        kernels = self._kernels(site)
        if self.official:
            return _published(site, kernels, weights)
        if site.patches is None:
            return _convolution(site, kernels, weights)
        return _merge(site, kernels, weights)

    def _kernels(self, site: StemSite) -> tuple[int, ...]:
        stride = site.stride[0]
        kernels = tuple(KERNEL_SIZES.get(stride, ()) if self.kernel_sizes is None else self.kernel_sizes)
        if not kernels:
            raise Refusal(
                f"there are no default kernels for stride {stride}",
                f"pass kernel_sizes=({stride}, {2 * stride})",
            )
        if any(size < stride or (size - stride) % 2 for size in kernels):
            raise Refusal(
                f"kernels {kernels} do not share the center of a {stride}x{stride} patch",
                f"use sizes from {stride} up, in even steps",
            )
        if site.out_channels % 2 ** (len(kernels) - 1):
            raise Refusal(
                f"{site.out_channels} channels cannot be split by halves among {len(kernels)} kernels",
                "pass fewer kernel_sizes",
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
    sequence = len(shape_of(site.source)) == 3
    sides, order = _geometry(site)
    weight = weights(site.weight).detach()
    filters = _filters_of_places(weight, order)
    shares = _shares(filters, kernels, site.kernel[0], 0)
    core = CrossScalePatches(
        GatherPatches(site.kernel, order, sides, flat=False),
        site.in_channels, site.out_channels, kernels,
        _norm(site.norm_node, weights, weight),
        site.grid if sequence else None,
    ).to(weight)  # fmt: skip
    _fill(core.projs, shares, site, weights)
    return _conversion(core, shares, filters, kernels)


def _geometry(site: StemSite) -> tuple[Pair, tuple[int, ...]]:
    """Of a merge: the sides of its map, and the order in which a patch's places lie in the channels."""
    assert site.patches is not None
    geometry = patch_geometry(site.patches, site.kernel, map_width(site.source))
    assert geometry is not None, "a merge is recognized by its geometry"
    return geometry


def _filters_of_places(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """A linear map of gathered patches, ``[out, places * in]``, as ``[out, in, side, side]``."""
    side = math.isqrt(len(order))
    filters = weight.unflatten(1, (side * side, -1))[:, torch.tensor(order).argsort()]  # the places row by row
    return filters.movedim(1, 2).unflatten(2, (side, side))


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
        filters, lost = _centered(weight, size, (size - stride) // 2 - padding)
        taken = lost[rest].argsort(stable=True)[:width].sort().values
        channels = rest[taken]
        shares.append(_Share(channels, filters[channels], float(lost[channels].sum())))
        rest = rest[~torch.isin(rest, channels)]
    return shares


def _centered(weight: Tensor, size: int, offset: int) -> tuple[Tensor, Tensor]:
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
            conv.weight.copy_(share.filters)  # type: ignore[operator]  # a ModuleList forgets its kind
            conv.bias.copy_(torch.zeros_like(conv.bias) if bias is None else bias[share.channels])  # type: ignore[operator, arg-type]  # nn.Conv2d with a bias


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


def _published(site: StemSite, kernels: tuple[int, ...], weights: Weights) -> Conversion:
    """CrossFormer's merge at stride 2, its stem elsewhere."""
    if site.stride[0] != CrossScaleMerge.STRIDE:
        return _published_stem(site, kernels, weights)
    if site.out_channels != 2 * site.in_channels:
        raise Refusal(
            f"the published merge doubles the channels, but this one maps {site.in_channels} to {site.out_channels}",
            "leave official out",
        )
    return _published_merge(site, kernels, weights)


def _published_stem(site: StemSite, kernels: tuple[int, ...], weights: Weights) -> Conversion:
    """The layer norm behind the donor's map becomes the stem's own; without one it is new."""
    if site.patches is not None:
        raise Refusal("the published merge has stride 2", "leave official out")
    weight, shape = weights(site.weight).detach(), (site.kernel[0], site.stride[0], site.padding[0])
    made = Published(CrossScaleStem(site.in_channels, site.out_channels, kernels, site.stride[0]), weight)
    kept = _carry_filters(made, "projs", weight, kernels, shape, _bias_of(site, weight, weights))
    norm = _norm_after(site)
    if norm is None:
        return _published_conversion(made, kept, kernels, Adapter(patches_to_image, shape))
    own = _norm(norm, weights, weight)
    assert own is not None
    made.carry("norm.weight", own.weight)
    made.carry("norm.bias", own.bias)
    made.module.norm.eps = own.eps  # type: ignore[union-attr]  # a module, as its weight shows
    run = patches_to_map if len(shape_of(norm)) == 4 else patches_to_tokens
    return _published_conversion(made, kept, kernels, Adapter(run, shape), until=norm)


def _published_merge(site: StemSite, kernels: tuple[int, ...], weights: Weights) -> Conversion:
    """The published layer norm is of every token, before the convolutions: that of a donor's patch, whose factors and
    offsets the convolutions take over, or else a new one."""
    weight = weights(site.weight).detach()
    bias, stride = _bias_of(site, weight, weights), site.stride[0]
    made = Published(CrossScaleMerge(site.in_channels, kernels), weight)
    shape = (site.kernel[0], stride, site.padding[0])
    adapter: Adapter | None = Adapter(merge_of_image, shape)
    if site.patches is not None:
        _, order = _geometry(site)
        norm = _norm(site.norm_node, weights, weight)
        if norm is not None:
            bias, weight = bias + weight @ norm.bias.detach(), weight * norm.weight.detach()
            made.settle("norm.weight", 1.0)
            made.settle("norm.bias", 0.0)
            made.module.norm.eps = norm.eps  # type: ignore[union-attr]  # a module, as its weight shows
        weight, shape = _filters_of_places(weight, order), (site.kernel[0], stride, 0)
        adapter = adapter_between(site.source, site.result, site.grid)
    kept = _carry_filters(made, "reductions", weight, kernels, shape, bias)
    return _published_conversion(made, kept, kernels, adapter, "; every token is normalized by itself")


def _carry_filters(
    made: Published, name: str, weight: Tensor, kernels: tuple[int, ...], shape: tuple[int, int, int], bias: Tensor
) -> float:
    """Channels in their own order, each filter in the middle of its kernel; the share of squared weight that fits."""
    _, stride, padding = shape
    start, lost = 0, 0.0
    for number, (size, width) in enumerate(zip(kernels, scale_widths(len(weight), len(kernels)), strict=True)):
        chosen = slice(start, start + width)
        filters, outside = _centered(weight[chosen], size, (size - stride) // 2 - padding)
        made.carry(f"{name}.{number}.weight", filters, int((filters != 0).sum()))
        made.carry(f"{name}.{number}.bias", bias[chosen])
        start, lost = start + width, lost + float(outside.sum())
    return 1 - lost / float(weight.square().sum())


def _published_conversion(
    made: Published,
    kept: float,
    kernels: tuple[int, ...],
    adapter: Adapter | None,
    note: str = "",
    until: Node | None = None,
) -> Conversion:
    same = kept == 1.0 and not note
    cut = "every filter lies inside its kernel" if kept == 1.0 else f"{kept:.1%} of the squared filters lie inside them"
    cut = f"kernels of {', '.join(map(str, kernels))}: {cut}"
    return made.conversion(
        Exactness.EXACT if same else Exactness.PROJECTED,
        cut + note,
        settings={"kernel_sizes": kernels, "kept_weight": round(kept, 6)},
        benefit="none at once",
        adapter=adapter,
        until=until,
    )


def _norm_after(site: StemSite) -> Node | None:
    """The layer norm over channels that alone reads the donor's tokens."""
    users = [] if site.tokens is None else list(site.tokens.users)
    users = [user for user in users if operator_name(user) != "aten::_assert_tensor_metadata"]
    if len(users) != 1 or operator_name(users[0]) != "aten::layer_norm":
        return None
    return users[0] if users[0].args[1] == [site.out_channels] else None


def _bias_of(site: StemSite, weight: Tensor, weights: Weights) -> Tensor:
    return weight.new_zeros(len(weight)) if site.bias is None else weights(site.bias).detach()


def _conversion(core: nn.Module, shares: list[_Share], weight: Tensor, kernels: tuple[int, ...]) -> Conversion:
    new, old = sum(share.filters.numel() for share in shares), weight.numel()
    benefit = f"none at once: {new / old:.1f} times the multiplications"
    cut = [(len(share.channels), size) for share, size in zip(shares, kernels, strict=True) if share.lost]
    if not cut:
        why = f"every filter lies inside its kernel, of {', '.join(map(str, kernels))}"
        return WholeSite(Exactness.EXACT, why, core, settings={"kernel_sizes": kernels}, benefit=benefit)
    count, sizes = sum(channels for channels, _ in cut), " and ".join(str(size) for _, size in cut)
    kept = 1 - sum(share.lost for share in shares) / float(weight.square().sum())
    return WholeSite(
        Exactness.PROJECTED,
        f"{count} of {len(weight)} filters are cut to kernels of {sizes}",
        core,
        settings={"kernel_sizes": kernels, "kept_weight": round(kept, 6)},
        benefit=benefit,
    )
