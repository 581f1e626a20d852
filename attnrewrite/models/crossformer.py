"""CrossFormer (Wang et al., ICLR 2022) and CrossFormer++ (Wang et al., TPAMI 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError
from ..modules.cross_scale import CrossScaleMerge, CrossScaleStem
from ..modules.drop_path import DropPath, drop_path_rates
from ..modules.feed_forward import FeedForward
from ..modules.initialization import initialize_linear
from ..modules.long_short_distance import LongShortDistanceAttention, check_choice
from .registry import Family, State, register_family
from .stage import Stage, stage_maps
from .vision_model import VisionModel

COOLING_PERIOD = 3
SMALLEST_GROUP = 4
SCHEDULES = ("linear", "linear_div", "alter", "7_14")


class CrossFormerBlock(nn.Module):
    """Pre-norm attention and feed-forward network, and in CrossFormer++ sometimes a cooling layer.

    That layer is a depthwise 3 x 3 convolution and a layer norm without residual, which keeps the amplitude of the
    residual stream from growing.

    Args:
        attention: at the width ``dim``.
        hidden_dim: of the feed-forward network.
        cooling: whether there is a cooling layer.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attention: LongShortDistanceAttention,
        hidden_dim: int,
        cooling: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden_dim)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if cooling else None
        self.ex_ln = nn.LayerNorm(dim) if cooling else None

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape."""
        source = source + self.drop_path(self.attn(self.norm1(source)))
        source = source + self.drop_path(self.mlp(self.norm2(source)))
        if self.ex_conv is not None and self.ex_ln is not None:
            source = self.ex_ln(self.ex_conv(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return source


class CrossFormer(VisionModel):
    """Image ``[B, in_chans, H, W]`` of any size to logits. Short and long distance attention take turns in a stage.

    ``forward_features`` gives the last map after its norm, ``[B, H / 32, W / 32, C]``.

    Arguments that every family takes are described in ``VisionModel``.

    Args:
        embed_dim: channels of the first stage; they double at each merge.
        depths, num_heads, mlp_ratios: one value per stage.
        group_sizes: one value per stage, or one per block; see ``group_schedule``.
        intervals: steps of long distance attention, one value per stage, or ``"adaptive"`` for all.
        cooling: CrossFormer++: a cooling layer after every third block that is not the last of its stage.
        patch_kernels: kernel sizes of the stem; the smallest is its stride.
        merge_kernels: kernel sizes of each merge.
        patch_norm: whether a layer norm follows the stem.
        position_bias, padding, centered, small_map, qkv_bias, scale: as in ``LongShortDistanceAttention``. The official
            dense backbones are ``small_map="global"``.
    """

    def __init__(
        self,
        *,
        patch_kernels: Sequence[int] = (4, 8, 16, 32),
        patch_norm: bool = True,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        group_sizes: Sequence[int | Sequence[int]] = (7, 7, 7, 7),
        intervals: Sequence[int] | str = (8, 4, 2, 1),
        cooling: bool = False,
        merge_kernels: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        qkv_bias: bool = True,
        scale: float | None = None,
        drop_path_rate: float = 0.2,
        position_bias: str = "dpb",
        padding: str = "mask",
        centered: bool = False,
        small_map: str = "shrink",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        steps: Sequence[int | str] = [intervals] * len(depths) if isinstance(intervals, str) else intervals
        _check(depths, num_heads, mlp_ratios, group_sizes, steps, merge_kernels)
        options: dict[str, Any] = {
            "position_bias": position_bias, "padding": padding, "centered": centered, "small_map": small_map,
            "qkv_bias": qkv_bias, "scale": scale,
        }  # fmt: skip
        self.patch_embed = CrossScaleStem(in_chans, embed_dim, patch_kernels, norm=patch_norm)
        self.layers = nn.ModuleList()
        for level, rates in enumerate(drop_path_rates(drop_path_rate, tuple(depths))):
            dim, depth, sizes = embed_dim << level, depths[level], group_sizes[level]
            sizes = [sizes] * depth if isinstance(sizes, int) else sizes
            blocks = []
            for place, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
                long = steps[level] if place % 2 else None
                attention = LongShortDistanceAttention(dim, num_heads[level], size, long, **options)
                cools = cooling and (place + 1) % COOLING_PERIOD == 0 and place + 1 < depth
                blocks.append(CrossFormerBlock(dim, attention, int(dim * mlp_ratios[level]), cools, rate))
            last = level + 1 == len(depths)
            self.layers.append(Stage(blocks, None if last else CrossScaleMerge(dim, merge_kernels[level])))
        self.num_features = self.head_hidden_size = embed_dim << (len(depths) - 1)
        self.feature_info = [
            {"num_chs": embed_dim << level, "reduction": patch_kernels[0] << level, "module": f"layers.{level}"}
            for level in range(len(depths))
        ]
        self.norm = nn.LayerNorm(self.num_features)
        self.reset_classifier(num_classes, global_pool)
        self.apply(initialize_linear)

    def forward_features(self, image: Tensor) -> Tensor:
        """``[B, H / 32, W / 32, C]``."""
        return self.norm(stage_maps(self.layers, self.patch_embed(image))[-1])

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """One map ``[B, channels, H / reduction, W / reduction]`` a level, without a norm, as the dense backbones."""
        return [source.permute(0, 3, 1, 2) for source in stage_maps(self.layers, self.patch_embed(image))]

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((1, 2))


def group_schedule(
    kind: str, depths: Sequence[int], side: int, group_sizes: Sequence[int] = (7, 7, 7, 7)
) -> list[list[int]]:
    """Group sizes of each block that grow with depth (progressive group size, CrossFormer++ section 3.2).

    Args:
        kind: ``"linear"``, a share of the map that grows linearly from 4 tokens to all; ``"linear_div"``, where shares
            above a half become a half (in the third stage, up to three quarters) or all; ``"alter"``, where in the
            third stage they become those in turn; ``"7_14"``, half of the third stage's size in its first four blocks.
        depths: blocks a stage.
        side: of the first stage's map.
        group_sizes: per stage, for ``"7_14"``.

    Raises:
        ArgumentError: for an unknown kind.
    """
    check_choice("kind", kind, SCHEDULES)
    first = SMALLEST_GROUP / side
    step = (1 - first) / sum(depths)
    schedule, count = [], 0
    for level, depth in enumerate(depths):
        sizes = []
        for place in range(depth):
            if kind == "7_14":
                sizes.append(group_sizes[level] // 2 if level == 2 and place < 4 else group_sizes[level])
            else:
                sizes.append(_scheduled(kind, level, side >> level, first + count * step, count))
            count += 1
        schedule.append(sizes)
    return schedule


def _scheduled(kind: str, level: int, side: int, share: float, count: int) -> int:
    size = side * share
    if kind != "linear" and size > side // 2:
        whole = size > side * 3 / 4 if kind == "linear_div" else count % 2 != 0
        size = side if whole or level != 2 else side // 2
    return max(SMALLEST_GROUP, math.ceil(size))


def _check(
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float],
    group_sizes: Sequence[int | Sequence[int]],
    intervals: Sequence[int | str],
    merge_kernels: Sequence[Sequence[int]],
) -> None:
    lengths = [len(values) for values in (depths, num_heads, mlp_ratios, group_sizes, intervals)]
    if len(set(lengths)) != 1:
        raise ArgumentError(f"depths: all per-stage options must have the same length, got {lengths}")
    if len(merge_kernels) != len(depths) - 1:
        raise ArgumentError(
            f"merge_kernels: {len(depths)} stages have {len(depths) - 1} merges, got {len(merge_kernels)}"
        )
    for depth, sizes in zip(depths, group_sizes, strict=True):
        if not isinstance(sizes, int) and len(sizes) != depth:
            raise ArgumentError(
                f"group_sizes: a stage of {depth} blocks needs one size, or {depth} of them, got {len(sizes)}"
            )


OLD_BUFFERS = (".attn.biases", ".attn.relative_position_index", ".attn_mask")
"""In the weights of the first public code; computed from the group size here."""


def owns(state: State) -> bool:
    """Whether weights are of this family, by their names."""
    return any(".attn.pos.pos_proj." in name for name in state)


def prepare(state: State) -> tuple[State, dict[str, Any]]:
    """The weights without the old code's buffers; the model's name or its shapes tell all the rest."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(OLD_BUFFERS)}, {}


_PLUS: dict[str, Any] = {
    "depths": (2, 2, 18, 2), "group_sizes": (4, 4, 14, 7), "intervals": (4, 2, 1, 1), "cooling": True,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "crossformer_tiny": {
        "embed_dim": 64, "depths": (1, 1, 8, 6), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.1,
    },
    "crossformer_small": {},
    "crossformer_base": {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3},
    "crossformer_large": {
        "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5,
    },
    "crossformerpp_small": {**_PLUS, "embed_dim": 64, "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2},
    "crossformerpp_base": {**_PLUS, "drop_path_rate": 0.3},
    "crossformerpp_large": {**_PLUS, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5},
    "crossformerpp_huge": {
        **_PLUS, "embed_dim": 128, "depths": (6, 6, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5,
    },
}  # fmt: skip

register_family(Family(model=CrossFormer, variants=VARIANTS, owns=owns, prepare=prepare))
