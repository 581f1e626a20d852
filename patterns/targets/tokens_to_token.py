"""Tokens-to-token stems in the place of a vision transformer's patch convolution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...cores.tokens_to_token import TokensToTokenBranch, TokensToTokenStem
from ...errors import ArgumentError, Refusal
from ...ir.contract import BesideStem, Conversion, Exactness, Target, Weights, WholeSite
from ...ir.sites import Site, StemSite
from ...modules.token_layers import TokenLayer
from ...modules.tokens_to_token import KINDS
from ..published import require_unset
from ..site_geometry import require_one_of

MODES = ("branch", "exact", "fit", "fresh")
TOKEN_DIM = 64
"""Of the published stems, after both token layers."""


@dataclass(frozen=True)
class TokensToToken(Target):
    """Tokens-to-token stem (Yuan et al. 2021), for stems of 16 x 16 patches: it makes as many tokens.

    Args:
        mode: ``"branch"`` keeps the convolution and adds a stem whose last map starts at zero; ``"exact"`` is a stem
            alone, without the norms of its patches and wide enough to hand every pixel on (48 and 192 channels for
            three colours); ``"fit"`` the nearest one of ``token_dim``; ``"fresh"`` the published one, untrained. None
            is ``"branch"``, and ``"fresh"`` where ``official``.
        kind: of the token layers, ``"transformer"`` or ``"performer"``.
        token_dim: channels after both token layers; None is 64. Has no meaning for ``"exact"``.
        covariance: for ``"fit"``: that of a patch's pixels, ``[n, n]`` in the order channel, row, column; the error is
            least for patches of that covariance. None is that of white noise.
        official: take the published stem alone.

    Raises:
        ArgumentError: options that are unknown or contradict each other.
    """

    mode: str | None = None
    kind: str = "transformer"
    token_dim: int | None = None
    covariance: Tensor | None = field(default=None, repr=False, compare=False)
    official: bool = False
    name = "tokens_to_token"
    kinds = ("stem",)

    def __post_init__(self) -> None:
        require_one_of("official", self.official, (False, True))
        if self.official:
            require_unset({"mode": None if self.mode == "fresh" else self.mode}, "which is mode='fresh'")
        if self.mode is None:
            object.__setattr__(self, "mode", "fresh" if self.official else "branch")
        require_one_of("mode", self.mode, MODES)
        require_one_of("kind", self.kind, tuple(KINDS))
        if self.token_dim is not None and (type(self.token_dim) is not int or self.token_dim < 1):
            raise ArgumentError(f"token_dim: expected a positive number, got {self.token_dim!r}")
        if self.mode == "exact" and self.token_dim is not None:
            raise ArgumentError("token_dim: mode='exact' determines it; leave token_dim out")
        if self.covariance is None:
            return
        if self.mode != "fit":
            raise ArgumentError(f"covariance: requires mode='fit', got mode={self.mode!r}; leave it out")
        square = isinstance(self.covariance, Tensor) and self.covariance.ndim == 2
        if not square or self.covariance.shape[0] != self.covariance.shape[1]:
            raise ArgumentError("covariance: expected a square matrix of the pixels of a patch")
        if not bool(self.covariance.isfinite().all()):
            raise ArgumentError("covariance: contains NaN or infinity; estimate it from finite images")

    def convert(self, site: Site, index: int, weights: Weights) -> Conversion:
        assert isinstance(site, StemSite)
        side = TokensToTokenStem.STRIDE
        if site.patches is not None or site.stride != (side, side):
            raise Refusal(
                f"a tokens-to-token stem makes one token per {side}x{side} pixels, but this one has stride "
                f"{site.stride[0]}: the number of tokens would change",
                "use to='cross_scale' for this site",
            )
        if site.kernel != (side, side) or site.padding != (0, 0):
            raise Refusal(
                f"its patches are not plain {side}x{side} ones (kernel {site.kernel}, padding {site.padding})"
            )
        settings: dict[str, Any] = {"mode": self.mode, "kind": self.kind}
        if self.mode == "branch":
            return self._branch(site, settings)
        if self.mode == "fresh":
            core = TokensToTokenStem(site.in_channels, site.out_channels, self.kind, self._token_dims())
            official = {"official": True} if self.official else {}
            return WholeSite(Exactness.FRESH, "the published stem, untrained", core, settings=settings | official)
        return self._exact(site, weights, settings) if self.mode == "exact" else self._fit(site, weights, settings)

    def _token_dims(self) -> tuple[int, int]:
        return (self.token_dim or TOKEN_DIM,) * 2

    def _branch(self, site: StemSite, settings: dict[str, Any]) -> Conversion:
        core = TokensToTokenBranch(site.in_channels, site.out_channels, self.kind, self._token_dims())
        _silence(core.project)
        return BesideStem(
            Exactness.CONTINUOUS,
            "beside the convolution, with a last map that starts at zero",
            core,
            settings=settings,
            benefit="none: it costs beside the convolution",
        )

    def _exact(self, site: StemSite, weights: Weights, settings: dict[str, Any]) -> Conversion:
        weight = weights(site.weight).detach()
        pixels = site.in_channels * 64
        core = self._stem(site, (pixels // 4, pixels), weight)
        hand_on = torch.eye(pixels, dtype=weight.dtype, device=weight.device)
        _fill(core, hand_on, _quadrants(weight), site, weights)
        return WholeSite(
            Exactness.EXACT,
            f"every pixel handed on through {pixels // 4} and {pixels} channels, no norm of patches",
            core,
            settings=settings,
            benefit="none at once",
        )

    def _fit(self, site: StemSite, weights: Weights, settings: dict[str, Any]) -> Conversion:
        dims = self._token_dims()
        if dims[0] < site.in_channels * 16:
            raise Refusal(
                f"{dims[0]} channels cannot carry the {site.in_channels * 16} values between neighboring tokens",
                f"use token_dim={site.in_channels * 16} or more",
            )
        weight = weights(site.weight).detach()
        narrow, last, residual = nearest_stem(weight.double(), dims[1], self._covariance(site))
        core = self._stem(site, dims, weight)
        _fill(core, narrow, last, site, weights)
        return WholeSite(
            Exactness.PROJECTED,
            f"the nearest stem of {dims[1]} channels, error {residual:.2g} on patches of "
            f"{'white noise' if self.covariance is None else 'the given covariance'}, no norm of patches",
            core,
            settings={**settings, "residual": residual},
            benefit="none at once",
        )

    def _stem(self, site: StemSite, dims: tuple[int, int], like: Tensor) -> TokensToTokenStem:
        return TokensToTokenStem(site.in_channels, site.out_channels, self.kind, dims, normalize=False).to(like)

    def _covariance(self, site: StemSite) -> Tensor | None:
        pixels = site.in_channels * site.kernel[0] * site.kernel[1]
        if self.covariance is None or self.covariance.shape[0] == pixels:
            return self.covariance
        raise ArgumentError(
            f"covariance: expected that of the {pixels} values of a patch, got {list(self.covariance.shape)}"
        )


def nearest_stem(weight: Tensor, token_dim: int, covariance: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """The linear stem through ``token_dim`` channels for each quarter of a patch that is nearest to ``weight``.

    The channels are the leading right singular vectors of the four quarters' filters, stacked, on pixels of the given
    covariance; the last map is the least squares solution for them.

    Args:
        weight: ``[channels, colours, 16, 16]``.
        covariance: ``[n, n]`` of a patch's pixels; None is white.

    Returns:
        ``[token_dim or less, n / 4]`` from a quarter's pixels, ``[channels, 4, token_dim or less]`` to the result, and
        the relative root mean square error of the result on patches of that covariance, bias apart.
    """
    quarters = _quadrants(weight)
    size = quarters.shape[-1]
    if covariance is None:
        spread = torch.eye(4 * size, dtype=weight.dtype, device=weight.device)
    else:
        spread = _by_quadrants(covariance.to(weight), weight.shape[1])
    of_quarter = torch.stack([spread[i : i + size, i : i + size] for i in range(0, 4 * size, size)]).mean(0)
    stacked = quarters.flatten(0, 1)
    left = torch.linalg.svd(stacked @ _square_root(of_quarter), full_matrices=False)[0]
    narrow = torch.linalg.qr((left[:, : min(token_dim, size)].T @ stacked).T)[0].T
    placed = torch.block_diag(*[narrow] * 4)
    through = placed @ spread
    whole = quarters.flatten(1)
    last = whole @ through.T @ torch.linalg.pinv(through @ placed.T, hermitian=True)
    error = whole - last @ placed
    squared = ((error @ spread) * error).sum() / ((whole @ spread) * whole).sum()
    return narrow, last.unflatten(1, (4, -1)), float(squared.clamp(min=0).sqrt())


def _quadrants(weight: Tensor) -> Tensor:
    """``[channels, colours, 16, 16]`` to ``[channels, 4, colours * 64]``."""
    cut = weight.unflatten(3, (2, 8)).unflatten(2, (2, 8))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _by_quadrants(covariance: Tensor, colours: int) -> Tensor:
    """The rows and columns of a covariance of patches in the order of ``_quadrants``."""
    for _ in range(2):
        covariance = _quadrants(covariance.unflatten(1, (colours, 16, 16))).flatten(1).T
    return covariance


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _fill(core: TokensToTokenStem, narrow: Tensor, last: Tensor, site: StemSite, weights: Weights) -> None:
    """Pixels through the values of both token layers, whose attention and feed-forward network start at zero.

    The first layer hands on the 4 x 4 pixels that its patches do not share, in the middle of 7 x 7; the second maps
    2 x 2 such tokens, in the lower right of 3 x 3, by ``narrow``; ``last`` maps 2 x 2 of its tokens to the result.
    Channels beyond those keep their values, and nothing reads them yet.
    """
    colours, kept = site.in_channels, len(narrow)
    pixels = 16 * colours
    first, second, project = core.attention1, core.attention2, core.project
    for layer in (first, second):
        _silence_branches(layer)
    with torch.no_grad():
        value = _value_filters(first, 7)
        value[:pixels] = 0
        value[:pixels, :, 2:6, 2:6] = torch.eye(pixels).unflatten(1, (colours, 4, 4)).to(value)
        value = _value_filters(second, 3)
        value[:kept] = 0
        tokens = narrow.unflatten(1, (colours, 2, 4, 2, 4)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        value[:kept, :pixels, 1:, 1:] = tokens.to(value)
        filters = nn.init.zeros_(project.weight).unflatten(1, (-1, 3, 3))
        filters[:, :kept, 1:, 1:] = last.unflatten(1, (2, 2)).permute(0, 3, 1, 2).to(filters)
        nn.init.zeros_(project.bias)
        if site.bias is not None:
            project.bias.copy_(weights(site.bias))


def _value_filters(layer: TokenLayer, side: int) -> Tensor:
    """The value rows of a token layer's first map as a view ``[out, in, side, side]``; their bias starts at zero.

    Both kinds have the value last.
    """
    linear = layer.projection()
    count = linear.out_features // 3
    if linear.bias is not None:
        linear.bias[-count:] = 0
    return linear.weight[-count:].unflatten(1, (-1, side, side))


def _silence_branches(layer: TokenLayer) -> None:
    """The last maps of attention and feed-forward network, which add to the values."""
    for name, end in layer.named_modules():
        if name.endswith("proj") or name in ("mlp.fc2", "mlp.2"):
            assert isinstance(end, nn.Linear)
            _silence(end)


def _silence(linear: nn.Linear) -> None:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
