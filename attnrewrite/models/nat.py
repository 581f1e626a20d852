"""NAT and DiNAT, and DiNAT_s, which is Swin with their attention.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023; Hassani and Shi, "Dilated Neighborhood Attention
Transformer", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import ArgumentError
from ..modules.drop_path import drop_path_rates
from ..modules.initialization import initialize_linear
from ..modules.neighborhood_block import (
    ConvDownsampler,
    ConvTokenizer,
    NeighborhoodBlock,
    PatchEmbedding,
    PatchMerging,
)
from .registry import Family, State, register_family
from .stage import Stage, stage_maps
from .vision_model import VisionModel

STEM_REDUCTION = 4
AT_224, AT_384 = (8, 4, 2, 1), (13, 6, 3, 1)
"""Widest dilation of each level for kernel 7 at 224 and at 384 pixels; the former also for kernel 11 at 384."""


class NAT(VisionModel):
    """Image ``[B, in_chans, H, W]`` of any size to logits: NAT, or DiNAT where there are dilations.

    There are levels, each of half the sides and twice the channels of the one before.

    ``forward_features`` gives the last map, normalized, ``[B, H / 32, W / 32, C]`` for four levels; ``feature_maps``
    every level's before its downsampling, not normalized.

    Arguments that every family takes are described in ``VisionModel``.

    Args:
        embed_dim: channels of the first level.
        depths, num_heads: one value per level.
        kernel_size: of every block's attention, in tokens per side.
        dilations: per level and block; None is 1. What does not fit a small map is handled as in
            ``NeighborhoodAttention2d``.
        mlp_ratio: hidden channels of the feed-forward networks over theirs.
        qkv_bias: whether query, key and value have a bias.
        qk_scale: of the dot products; None is ``head_dim ** -0.5``.
        layer_scale: initial value of trained factors on residual branches; None is none.
    """

    levels_name: ClassVar[str] = "levels"

    def __init__(
        self,
        *,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.2,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        dilations = [[1] * depth for depth in depths] if dilations is None else dilations
        _check(depths, num_heads, dilations)
        rates = drop_path_rates(drop_path_rate, tuple(depths))
        dims = [embed_dim * 2**level for level in range(len(depths))]
        shared: dict[str, Any] = {
            "kernel_size": kernel_size, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "scale": qk_scale,
            "layer_scale": layer_scale,
        }  # fmt: skip

        def level(index: int) -> Stage:
            blocks = (
                NeighborhoodBlock(dims[index], num_heads[index], dilation=dilation, drop_path=rate, **shared)
                for dilation, rate in zip(dilations[index], rates[index], strict=True)
            )
            return Stage(blocks, self.make_downsample(dims[index]) if index + 1 < len(dims) else None)

        self.patch_embed = self.make_stem(in_chans, embed_dim)
        self.add_module(self.levels_name, nn.ModuleList(level(index) for index in range(len(dims))))
        self.norm = nn.LayerNorm(dims[-1])
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": STEM_REDUCTION * 2**index, "module": f"{self.levels_name}.{index}"}
            for index, dim in enumerate(dims)
        ]
        self.apply(initialize_linear)
        self.reset_classifier(num_classes, global_pool)

    def make_stem(self, in_chans: int, dim: int) -> nn.Module:
        """An image to the first level's map, of a quarter of its sides."""
        return ConvTokenizer(in_chans, dim)

    def make_downsample(self, dim: int) -> nn.Module:
        """A level's map to half its sides and twice its channels."""
        return ConvDownsampler(dim)

    def forward_features(self, image: Tensor) -> Tensor:
        return self.norm(self._levels(image)[-1])

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((1, 2))

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        return [level.permute(0, 3, 1, 2) for level in self._levels(image)]

    def _levels(self, image: Tensor) -> list[Tensor]:
        return stage_maps(self.get_submodule(self.levels_name).children(), self.patch_embed(image))


class DiNATS(NAT):
    """DiNAT_s: Swin's patch embedding and merging around DiNAT's blocks. Arguments as in ``NAT``."""

    levels_name: ClassVar[str] = "layers"

    def make_stem(self, in_chans: int, dim: int) -> nn.Module:
        return PatchEmbedding(in_chans, dim, STEM_REDUCTION)

    def make_downsample(self, dim: int) -> nn.Module:
        return PatchMerging(dim)


def _check(depths: Sequence[int], num_heads: Sequence[int], dilations: Sequence[Sequence[int]]) -> None:
    if not len(depths) == len(num_heads) == len(dilations):
        raise ArgumentError(
            f"depths, num_heads, dilations: must have one entry per level, got {len(depths)}, {len(num_heads)} and "
            f"{len(dilations)}"
        )
    for level, (depth, own) in enumerate(zip(depths, dilations, strict=True)):
        if depth != len(own):
            raise ArgumentError(f"dilations: level {level} has {depth} blocks, got {len(own)} values")


def _shape(dim: int, depths: Sequence[int], first_heads: int, mlp_ratio: float, drop_path: float) -> dict[str, Any]:
    heads = [first_heads * 2**level for level in range(4)]
    shape = {"embed_dim": dim, "depths": tuple(depths), "num_heads": tuple(heads), "mlp_ratio": mlp_ratio}
    return {**shape, "drop_path_rate": drop_path}


def _dilated(shape: Mapping[str, Any], widest: Sequence[int]) -> dict[str, Any]:
    """The shape, with every second block of a level dilated as widely as its map allows."""
    levels = zip(shape["depths"], widest, strict=True)
    return {**shape, "dilations": [[(1, wide)[block % 2] for block in range(depth)] for depth, wide in levels]}


def _nat_variants() -> dict[str, Mapping[str, Any]]:
    shapes = {
        "mini": _shape(64, (3, 4, 6, 5), 2, 3.0, 0.2),
        "tiny": _shape(64, (3, 4, 18, 5), 2, 3.0, 0.2),
        "small": _shape(96, (3, 4, 18, 5), 3, 2.0, 0.3),
        "base": _shape(128, (3, 4, 18, 5), 4, 2.0, 0.5),
        "large": _shape(192, (3, 4, 18, 5), 6, 2.0, 0.35),
    }
    scaled = {"layer_scale": 1e-5}
    nat = {f"nat_{size}": shapes[size] for size in ("mini", "tiny")}
    nat |= {f"nat_{size}": {**shapes[size], **scaled} for size in ("small", "base")}
    dinat = {f"dinat_{size}": _dilated(shape, AT_224) for size, shape in shapes.items()}
    dinat["dinat_base"] |= scaled
    large = shapes["large"]
    dinat["dinat_large_384"] = _dilated(large, AT_384)
    dinat["dinat_large_384_11x11"] = {**_dilated(large, AT_224), "kernel_size": 11}
    return {**nat, **dinat}


def _dinat_s_variants() -> dict[str, Mapping[str, Any]]:
    shapes = {
        "tiny": _shape(96, (2, 2, 6, 2), 3, 4.0, 0.2),
        "small": _shape(96, (2, 2, 18, 2), 3, 4.0, 0.3),
        "base": _shape(128, (2, 2, 18, 2), 4, 4.0, 0.5),
        "large": _shape(192, (2, 2, 18, 2), 6, 4.0, 0.35),
    }
    variants: dict[str, Mapping[str, Any]] = {
        f"dinat_s_{size}": _dilated(shape, AT_224) for size, shape in shapes.items()
    }
    variants["dinat_s_large_384"] = _dilated(shapes["large"], AT_384)
    return variants


def _prepare(state: State) -> tuple[State, dict[str, Any]]:
    return state, {}


def _owner_of(levels_name: str) -> Callable[[State], bool]:
    return lambda state: f"{levels_name}.0.blocks.0.attn.rpb" in state


register_family(Family(model=NAT, variants=_nat_variants(), owns=_owner_of(NAT.levels_name), prepare=_prepare))
register_family(
    Family(model=DiNATS, variants=_dinat_s_variants(), owns=_owner_of(DiNATS.levels_name), prepare=_prepare)
)
