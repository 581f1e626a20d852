"""T2T-ViT (Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import ArgumentError, CheckpointError
from ..modules.drop_path import drop_path_rates
from ..modules.initialization import initialize_linear
from ..modules.tokens_to_token import SMALLEST_SIDE, TokensToToken, resample_positions, sinusoid_table
from ..modules.transformer_block import TransformerBlock
from .registry import Family, State, register_family
from .vision_model import VisionModel

REDUCTION = 16


class T2TViT(VisionModel):
    """Image ``[B, in_chans, H, W]`` of any size to logits.

    ``forward_features`` gives the normalized tokens ``[B, 1 + N, embed_dim]``, the class token first.

    Positions start as sine and cosine codes of the raster index, not of row and column, and are not trained. The state
    holds them for the map of ``img_size``. To an image with another map they are resampled over rows and columns, as
    the official loader does it before fine-tuning.

    Arguments that every family takes are described in ``VisionModel``.

    Args:
        img_size: whose positions the state holds, in pixels: one side or height and width. Images of any size are
            taken all the same.
        kind, token_dims: as in ``TokensToToken``.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer.
        qkv_bias: whether its query, key and value have a bias.
        qk_scale: of its dot products; None is ``head_dim ** -0.5``, with which the published weights are evaluated
            (the official code takes ``embed_dim ** -0.5`` only when asked for pretrained weights by name).

    Attributes:
        position_grid: rows and columns of the map whose positions ``pos_embed`` ``[1, 1 + rows * columns, embed_dim]``
            holds, the class token's first. Whoever replaces them by those of another map sets it too.
    """

    default_pool: ClassVar[str] = "token"

    def __init__(
        self,
        *,
        kind: str = "performer",
        token_dims: Sequence[int] = (64, 64),
        img_size: int | Sequence[int] = 224,
        embed_dim: int = 384,
        depth: int = 14,
        drop_path_rate: float = 0.0,
        num_heads: int = 6,
        qk_scale: float | None = None,
        qkv_bias: bool = False,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = embed_dim
        self.feature_info = [{"num_chs": embed_dim, "reduction": REDUCTION, "module": "norm"}]
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < SMALLEST_SIDE:
            raise ArgumentError(f"img_size: sides must be at least {SMALLEST_SIDE} pixels, got {img_size}")
        self.position_grid = TokensToToken.grid(height, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = sinusoid_table(1 + math.prod(self.position_grid), embed_dim).unsqueeze(0).to(self.cls_token)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.tokens_to_token = TokensToToken(in_chans, embed_dim, kind, token_dims)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, rate)
            for rate in drop_path_rates(drop_path_rate, (depth,))[0]
        )
        self.norm = nn.LayerNorm(embed_dim)
        if not self.cls_token.is_meta:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.apply(initialize_linear)
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, image: Tensor) -> Tensor:
        return self._encode(self.tokens_to_token(image))

    def pool(self, features: Tensor) -> Tensor:
        return features[:, 0]

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """One level: the normalized tokens of the map."""
        tokens = self.tokens_to_token(image)
        features = self._encode(tokens)[:, 1:]
        return [features.unflatten(1, tokens.shape[1:3]).permute(0, 3, 1, 2)]

    def fit_state(self, state: State) -> State:
        """With the positions of another square map resampled to this model's, as the official loader does.

        As many positions as the model has are taken for those of its map, whatever its sides.

        Raises:
            CheckpointError: there are others than the model has, and not of a square map: their rows and columns are
                unknown.
        """
        positions = state.get("pos_embed")
        if positions is None or positions.ndim != 3 or positions.shape[1] == self.pos_embed.shape[1]:
            return state
        side = _square_side(positions)
        if side is None:
            rows, columns = self.position_grid
            raise CheckpointError(
                f"pos_embed: the {positions.shape[1] - 1} positions after the class token's are neither those of the "
                f"model's {rows} x {columns} map nor of a square one; pass img_size=(height, width) of the images that "
                "they are for"
            )
        return {**state, "pos_embed": resample_positions(positions, (side, side), self.position_grid)}

    def _encode(self, tokens: Tensor) -> Tensor:
        """``[B, H', W', embed_dim]`` to the normalized tokens, the class token before them."""
        positions = self._positions(tokens.shape[1], tokens.shape[2])
        class_token = self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        tokens = torch.cat([class_token, tokens.flatten(1, 2)], dim=1) + positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def _positions(self, rows: int, columns: int) -> Tensor:
        held = self.position_grid
        # Asked without a guard, so that a graph of dynamic sides takes the stored ones too; it resamples there, which
        # changes no bit.
        if statically_known_true(rows == held[0]) and statically_known_true(columns == held[1]):
            return self.pos_embed
        return resample_positions(self.pos_embed, held, (rows, columns))


def _variants() -> dict[str, Mapping[str, Any]]:
    widths = {7: (256, 4, 2.0), 14: (384, 6, 3.0), 19: (448, 7, 3.0), 24: (512, 8, 3.0)}
    widths |= {10: widths[7], 12: widths[7]}

    def options(depth: int, kind: str) -> dict[str, Any]:
        embed_dim, num_heads, mlp_ratio = widths[depth]
        return {
            "kind": kind, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
        }  # fmt: skip

    fourteen = options(14, "performer")
    return {
        **{f"t2t_vit_{depth}": options(depth, "performer") for depth in sorted(widths)},
        **{f"t2t_vit_t_{depth}": options(depth, "transformer") for depth in (14, 19, 24)},
        "t2t_vit_14_resnext": {**fourteen, "num_heads": 32},
        "t2t_vit_14_wide": {**fourteen, "embed_dim": 768, "depth": 4, "num_heads": 12},
    }


def _prepare(state: State) -> tuple[State, dict[str, Any]]:
    """The positions tell for which square image the weights are."""
    side = _square_side(state["pos_embed"]) if "pos_embed" in state else None
    told = {} if side is None else {"img_size": REDUCTION * side}
    return state, told


def _square_side(positions: Tensor) -> int | None:
    """Of the square map whose positions ``[1, 1 + side ** 2, dim]`` may be; None if it cannot be square."""
    tokens = positions.shape[1] - 1 if positions.ndim == 3 else 0
    side = math.isqrt(max(tokens, 0))
    return side if side > 0 and side**2 == tokens else None


def _owns(state: State) -> bool:
    return "tokens_to_token.project.weight" in state


register_family(Family(model=T2TViT, variants=_variants(), owns=_owns, prepare=_prepare))
