"""The stem of T2T-ViT (Yuan et al., "Tokens-to-Token ViT", ICCV 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sympy import Expr, sympify
from torch import Tensor, nn

from ..algebra.module_formula import CostedCall
from ..algebra.site_formula import OUT, STATE, ZERO, D, E, Extent, N, SiteFormula
from ..algebra.symbols import strided, symbol
from ..errors import ArgumentError, nearest
from ..numerics.precision import accumulation_dtype
from ..operators.soft_split import PatchGrid
from .patch_projection import project_patches
from .token_layers import TokenLayer, TokenPerformer, TokenTransformer

KINDS: dict[str, type[TokenTransformer | TokenPerformer]] = {
    "transformer": TokenTransformer,
    "performer": TokenPerformer,
}
PIXELS, TOKENS = PatchGrid(7, 4, 2), PatchGrid(3, 2, 1)
SMALLEST_SIDE = PIXELS.kernel_size - 2 * PIXELS.padding


def _split_sides(height: Extent, width: Extent) -> list[tuple[Expr, Expr]]:
    """The sides of the map after each of the three splits into patches, for costs."""
    sides, made = (sympify(height), sympify(width)), []
    for patches in (PIXELS, TOKENS, TOKENS):
        sides = tuple(strided(side, patches.kernel_size, patches.stride, patches.padding) for side in sides)
        made.append(sides)
    return made


class TokensToToken(nn.Module):
    """An image to a map of a sixteenth of its sides, through two token layers and a projection of overlapping patches.

    Equal to unfolding three times, but no patch is ever gathered. The image may have any sides.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the result.
        kind: of the token layers, ``"transformer"`` or ``"performer"``.
        token_dims: channels after each token layer.
        normalize: False leaves out the layer norms of the patches, which the official stem has. With them the stem
            ignores brightness and contrast, so that no convolution of the image can be expressed; without them a
            16 x 16 one can from ``token_dims`` (48, 192) on, for three channels.

    Raises:
        ArgumentError: for an unknown kind or widths that are not two positive numbers.
    """

    costed_call = CostedCall(
        "image", channels_first=True, counted_by_formula=True, kind="stem",
        result=lambda height, width: _split_sides(height, width)[-1],
    )  # fmt: skip

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 768,
        kind: str = "performer",
        token_dims: Sequence[int] = (64, 64),
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ArgumentError(f"kind: must be one of {', '.join(KINDS)}, got {kind!r}{nearest(kind, KINDS)}")
        if len(token_dims) != 2 or min(token_dims) < 1:
            raise ArgumentError(f"token_dims: must be two positive widths, one per token layer, got {token_dims}")
        first, second = token_dims
        self.attention1: TokenLayer = KINDS[kind](in_chans * PIXELS.kernel_size**2, first)
        self.attention2: TokenLayer = KINDS[kind](first * TOKENS.kernel_size**2, second)
        if not normalize:
            self.attention1.norm1, self.attention2.norm1 = nn.Identity(), nn.Identity()
        self.project = nn.Linear(second * TOKENS.kernel_size**2, embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, in_chans, H, W]`` to ``[B, H', W', embed_dim]``.

        Of a side S there remain ``ceil((S + 1) // 4 / 4)`` tokens: S / 16 where that is whole.

        Raises:
            ArgumentError: for a side below 3 pixels.
        """
        if min(image.shape[-2:]) < SMALLEST_SIDE:
            raise ArgumentError(
                f"image: sides must be at least {SMALLEST_SIDE} pixels, got {tuple(image.shape[-2:])}"
            )
        tokens = self.attention1.forward_patches(image, PIXELS).permute(0, 3, 1, 2)
        tokens = self.attention2.forward_patches(tokens, TOKENS).permute(0, 3, 1, 2)
        return project_patches(tokens, nn.Identity(), self.project, TOKENS)

    def formula(self, height: Extent, width: Extent) -> SiteFormula:
        """Both token layers on their patches, and the linear map of the last ones."""
        first, second, last = (rows * columns for rows, columns in _split_sides(height, width))
        layers = (self.attention1.formula(first), self.attention2.formula(second))
        apart = {name for name in (N, D, E, STATE) if name in (N, D) or layers[0].values[E] != layers[1].values[E]}
        found, width_of_tokens = SiteFormula("T2T stem", dense=ZERO), E
        summed = ("dense", "core", "attention_map", "normalization", "saved")
        for number, layer in enumerate(layers, start=1):
            own = {name: symbol(f"{name}_{number}") for name in apart}
            values = {own.get(name, name): value for name, value in layer.values.items()}
            parts = {name: getattr(layer, name) for name in summed}
            found = found.plus(values, **{name: part.subs(own, simultaneous=True) for name, part in parts.items()})
            width_of_tokens = own.get(E, E)
        return found.plus({OUT: self.project.out_features, N: last}, dense=TOKENS.macs(N, width_of_tokens, OUT))

    @staticmethod
    def grid(height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for an image of these sides in pixels."""

        def side(pixels: int) -> int:
            for patches in (PIXELS, TOKENS, TOKENS):
                pixels = patches.cells(pixels)
            return pixels

        return side(height), side(width)


def sinusoid_table(length: int, dim: int) -> Tensor:
    """Sine and cosine codes of positions (Vaswani et al. 2017), ``[length, dim]`` in float64: even channels sine."""
    channels = torch.arange(dim, dtype=torch.float64, device="cpu")
    wavelengths = 10000 ** (2 * (channels // 2) / dim)
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] / wavelengths
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())


def resample_positions(positions: Tensor, stored: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Codes of a map's positions for a map of another size, as the official loader resizes them.

    Bicubic over rows and columns, corners not aligned, not antialiased. The class token keeps its code.

    Args:
        positions: ``[1, 1 + rows * columns, dim]`` of any floating dtype, the class token's first.
        stored: rows and columns of the map they are of.
        wanted: rows and columns of the map they are for.

    Returns:
        ``[1, 1 + rows * columns, dim]`` of the wanted map, in the dtype of ``positions``; half precision is
        interpolated in float32. Between equal maps all weights are exactly 0 or 1, and so it is ``positions``.

    Raises:
        ArgumentError: ``positions`` are not of the stored map.
    """
    rows, columns = stored
    if positions.shape[1] != 1 + rows * columns:
        raise ArgumentError(
            f"positions: a class token and a map of {rows} x {columns} have {1 + rows * columns} of them, "
            f"got {positions.shape[1]}"
        )
    token, codes = positions[:, :1], positions[:, 1:].to(accumulation_dtype(positions.dtype))
    codes = codes.unflatten(1, stored).permute(0, 3, 1, 2)
    codes = F.interpolate(codes, size=wanted, mode="bicubic", align_corners=False)
    return torch.cat([token, codes.flatten(2).mT.to(positions.dtype)], dim=1)
