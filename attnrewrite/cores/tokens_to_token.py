"""Tokens-to-token stems (T2T-ViT, Yuan et al. 2021) in the place of a convolution of 16 x 16 patches, or beside it."""

from __future__ import annotations

from sympy import Expr, Integer
from torch import Tensor

from ..algebra.module_formula import CostedCall
from ..algebra.site_formula import Extent
from ..algebra.symbols import down
from ..ir.core import StageCore
from ..modules.tokens_to_token import TokensToToken


class TokensToTokenStem(TokensToToken):
    """The map as a convolution gives it: channels first, a token for every whole patch."""

    STRIDE = 16

    costed_call = CostedCall(
        "image", channels_first=True, counted_by_formula=True, kind="stem",
        result=lambda height, width: TokensToTokenStem.whole_patches(height, width), result_first=True,
    )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, embed_dim, H // 16, W // 16]``."""
        rows, columns = (side // self.STRIDE for side in image.shape[-2:])
        return super().forward(image)[:, :rows, :columns].permute(0, 3, 1, 2)

    @classmethod
    def whole_patches(cls, height: Extent, width: Extent) -> tuple[Expr, Expr]:
        """Rows and columns of the result, for costs."""
        return down(height, Integer(cls.STRIDE)), down(width, Integer(cls.STRIDE))


class TokensToTokenBranch(TokensToTokenStem, StageCore):
    """The same, added to what a convolution made of the image."""

    takes_source = True
    costed_call = CostedCall("source", ("projected",), channels_first=True, counted_by_formula=True, kind="stem")

    def forward(self, projected: Tensor, source: Tensor) -> Tensor:  # type: ignore[override]  # nn.Module.forward is free
        """``projected`` ``[B, embed_dim, H // 16, W // 16]`` of the image ``source`` in, the same shape out."""
        return projected + super().forward(source)
