"""TransNeXt (Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError
from ..ir.heads import as_pair
from ..modules.aggregated import AggregatedAttention
from ..modules.conv_glu import ConvGLU, gated_width
from ..modules.cosine_attention import CosineAttention
from ..modules.drop_path import DropPath, drop_path_rates
from ..modules.initialization import initialize
from .registry import Family, State, register_family
from .vision_model import VisionModel

BACKBONE = "backbone."
"""Before the names of the weights in checkpoints of whole detectors and segmenters."""


class OverlapPatchEmbed(nn.Module):
    """Convolution whose patches overlap, then layer norm (Wang et al. 2022, PVT v2).

    Args:
        patch_size: side of the kernel, which is padded by half of it.
        stride: pixels between patches.
        in_chans, embed_dim: channels in and out.
    """

    def __init__(self, patch_size: int, stride: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, padding=patch_size // 2)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to the channels-last map ``[B, H / stride, W / stride, embed_dim]``, rounded up."""
        return self.norm(self.proj(source).permute(0, 2, 3, 1))


class TransNeXtBlock(nn.Module):
    """Attention and ``ConvGLU``, each after a layer norm and beside a residual.

    Args:
        attention: of maps ``[B, H, W, dim]``.
        dim: channels.
        hidden_dim: of ``ConvGLU``.
        dropout: rate in ``ConvGLU``.
        drop_path: rate of both branches.
        norm_eps: of the layer norms.
    """

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ConvGLU(dim, hidden_dim, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, source: Tensor) -> Tensor:
        """``[B, H, W, dim]`` to the same shape."""
        source = source + self.drop_path(self.attn(self.norm1(source)))
        return source + self.drop_path(self.mlp(self.norm2(source)))


class TransNeXt(VisionModel):
    """Image ``[B, in_chans, H, W]`` of any size to logits.

    ``forward_features`` gives the last map ``[B, H / 32, W / 32, C]``, after its norm.

    Arguments that every family takes are described in ``VisionModel``.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: one value per stage; a block's gated unit is two thirds of
            ``mlp_ratio * embed_dim`` wide.
        sr_ratios: per stage, pixels per side that a cell of the pooled map stands for; 1 is ``CosineAttention`` to the
            whole map instead of ``AggregatedAttention``.
        window_size: of ``AggregatedAttention``, one for all stages or one per stage (unused where the ratio is 1).
        fixed_pool_size: side of the pooled map for images of any size, instead of ``sr_ratios`` ("linear mode").
        patch_size: pixels between the first patches, whose kernel is ``2 * patch_size - 1``.
        pretrain_size: of the image in pretraining, a side or (height, width), the unit of the position bias.
        interpolate_bias: on images of another size, resample the position bias of ``pretrain_size``, as the official
            detectors and segmenters do by default, instead of computing it for the size.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        drop_rate, attn_drop_rate: dropout of projections and gated units, and of attention weights.
        norm_eps: of the blocks' and stages' layer norms.
    """

    def __init__(
        self,
        *,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int | Sequence[int | None] = 3,
        pretrain_size: int | tuple[int, int] = 224,
        interpolate_bias: bool = False,
        fixed_pool_size: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.num_stages = len(embed_dims)
        windows = (window_size,) * self.num_stages if isinstance(window_size, int) else tuple(window_size)
        per_stage = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "sr_ratios": sr_ratios}
        _check({**per_stage, "window_size": windows}, self.num_stages)
        widths, rates = (in_chans, *embed_dims), drop_path_rates(drop_path_rate, tuple(depths))
        for stage, dim in enumerate(embed_dims):
            kernel, stride = (3, 2) if stage else (2 * patch_size - 1, patch_size)
            embed = OverlapPatchEmbed(kernel, stride, widths[stage], dim)
            trained_sides = (side // (patch_size * 2**stage) for side in as_pair(pretrain_size))
            options: dict[str, Any] = {
                "qkv_bias": qkv_bias, "pretrain_size": tuple(max(side, 1) for side in trained_sides),
                "interpolate_bias": interpolate_bias, "attn_drop": attn_drop_rate, "proj_drop": drop_rate,
            }  # fmt: skip
            hidden = gated_width(int(dim * mlp_ratios[stage]))
            blocks = (
                TransNeXtBlock(
                    _attention(dim, num_heads[stage], windows[stage], sr_ratios[stage], fixed_pool_size, options),
                    dim, hidden, dropout=drop_rate, drop_path=rate, norm_eps=norm_eps,
                )
                for rate in rates[stage]
            )  # fmt: skip
            self.add_module(f"patch_embed{stage + 1}", embed.apply(initialize))
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=norm_eps))
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"norm{stage + 1}"}
            for stage, dim in enumerate(embed_dims)
        ]
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, image: Tensor) -> Tensor:
        """``[B, H / 32, W / 32, C]``, each side rounded up."""
        return self._stage_maps(image)[-1]

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((1, 2))

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        return [part.permute(0, 3, 1, 2) for part in self._stage_maps(image)]

    def _stage_maps(self, image: Tensor) -> list[Tensor]:
        """The normalized, channels-last map of each stage; the next one continues from it."""
        maps, source = [], image
        for stage in range(1, self.num_stages + 1):
            source = self.get_submodule(f"patch_embed{stage}")(source)
            for block in self.get_submodule(f"block{stage}").children():
                source = block(source)
            maps.append(self.get_submodule(f"norm{stage}")(source))
            source = maps[-1].permute(0, 3, 1, 2)
        return maps


def _check(per_stage: dict[str, Sequence[Any]], stages: int) -> None:
    for argument, values in per_stage.items():
        if len(values) != stages:
            raise ArgumentError(
                f"{argument}: must have one value for each of the {stages} embed_dims, got {len(values)}"
            )


def _attention(
    dim: int, heads: int, window: int | None, ratio: int, pool_size: int | None, options: dict[str, Any]
) -> nn.Module:
    """The attention of one block: to the whole map where the pooled one would be as large."""
    if ratio == 1:
        return CosineAttention(dim, heads, **options)
    if window is None:
        raise ArgumentError(
            f"window_size: required by a stage with sr_ratio {ratio}, got None; the official value is 3"
        )
    return AggregatedAttention(
        dim,
        heads,
        window_size=window,
        sr_ratio=ratio if pool_size is None else None,
        pool_size=pool_size,
        **options,
    )


WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "micro": {"embed_dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16)},
    "tiny": {"embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)},
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "transnext_micro": {**WIDTHS["micro"], "depths": (2, 2, 15, 2)},
    "transnext_tiny": {**WIDTHS["tiny"], "depths": (2, 2, 15, 2)},
    "transnext_small": {**WIDTHS["tiny"], "depths": (5, 5, 22, 5)},
    "transnext_base": {**WIDTHS["base"], "depths": (5, 5, 23, 5)},
    "transnext_micro_aaaa": {
        **WIDTHS["micro"],
        "depths": (2, 2, 15, 2),
        "sr_ratios": (16, 8, 4, 2),
        "pretrain_size": 256,
    },
}


def _owns(state: State) -> bool:
    return any(name.endswith(".attn.query_embedding") for name in state)


def _prepare(state: State) -> tuple[State, dict[str, Any]]:
    """Of a detector's or segmenter's weights, those of the backbone."""
    if any(name.startswith(BACKBONE) for name in state):
        state = {name.removeprefix(BACKBONE): part for name, part in state.items() if name.startswith(BACKBONE)}
    return state, {}


register_family(Family(TransNeXt, VARIANTS, _owns, _prepare))
