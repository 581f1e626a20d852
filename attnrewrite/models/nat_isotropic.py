"""The isotropic models of Hassani and Shi ("Dilated Neighborhood Attention Transformer", 2022): one map throughout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..modules.drop_path import drop_path_rates
from ..modules.initialization import initialize_linear
from ..modules.neighborhood_block import NeighborhoodBlock, PatchEmbedding
from .registry import Family, State, register_family
from .vision_model import VisionModel


class IsotropicNAT(VisionModel):
    """Image ``[B, in_chans, H, W]`` of any size to logits.

    A plain vision transformer with neighborhood attention, relative positions, and no class token.
    ``forward_features`` gives the normalized map ``[B, H / patch_size, W / patch_size, embed_dim]``.

    Arguments that every family takes are described in ``VisionModel``.

    Args:
        patch_size: in pixels per side; images are padded to whole patches.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer.
        kernel_size: of every block's attention, in tokens per side. One as large as the map is attention to all of it;
            14 is so the official ViT with relative position bias at 224 pixels.
        dilation: of every second block. What does not fit a small map is handled as in ``NeighborhoodAttention2d``.
        qkv_bias: whether query, key and value have a bias.
        qk_scale: of the dot products; None is ``head_dim ** -0.5``.
        patch_norm: whether the patches' embedding is normalized.
    """

    def __init__(
        self,
        *,
        patch_size: int = 16,
        patch_norm: bool = True,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        dilation: int = 2,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.1,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = embed_dim
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": "norm"}]
        self.patch_embed = PatchEmbedding(in_chans, embed_dim, patch_size, patch_norm)
        self.layers = nn.Sequential(
            *(
                NeighborhoodBlock(
                    embed_dim, num_heads, kernel_size, (1, dilation)[index % 2], mlp_ratio, qkv_bias, qk_scale, rate
                )
                for index, rate in enumerate(drop_path_rates(drop_path_rate, (depth,))[0])
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(initialize_linear)
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, image: Tensor) -> Tensor:
        return self.norm(self.layers(self.patch_embed(image)))

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((1, 2))

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """One level: the normalized map."""
        return [self.forward_features(image).permute(0, 3, 1, 2)]


def _variants() -> dict[str, Mapping[str, Any]]:
    sizes = {
        "small": {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1},
        "base": {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4},
    }
    patterns = {"nat_isotropic": (7, 1), "dinat_isotropic": (7, 2), "vitrpb": (14, 1)}
    return {
        f"{name}_{size}": {**shape, "kernel_size": kernel_size, "dilation": dilation}
        for name, (kernel_size, dilation) in patterns.items()
        for size, shape in sizes.items()
    }


def _prepare(state: State) -> tuple[State, dict[str, Any]]:
    """Without the index of the relative positions, which the official ViT keeps."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(".relative_position_index")}, {}


def _owns(state: State) -> bool:
    return "layers.0.attn.rpb" in state


register_family(Family(model=IsotropicNAT, variants=_variants(), owns=_owns, prepare=_prepare))
