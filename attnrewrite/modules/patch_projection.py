"""Layer norm and linear layer of overlapping patches, as the operator that never gathers them."""

from __future__ import annotations

from torch import Tensor, nn

from ..operators.soft_split import PatchGrid, PatchNorm, soft_split


def project_patches(image: Tensor, norm: nn.Module, linear: nn.Linear, patches: PatchGrid) -> Tensor:
    """``linear(norm(patch))`` for every patch of an image; see ``soft_split``.

    Args:
        image: ``[B, C, H, W]``.
        norm: ``nn.LayerNorm`` over a patch's ``C * kernel_size ** 2`` values, or ``nn.Identity``.
        linear: from those values.
        patches: the patches.

    Returns:
        ``[B, H', W', linear.out_features]``, contiguous, in the dtype of the weights (also under autocast).
    """
    patch_norm = PatchNorm(norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else None
    return soft_split(image, linear.weight, linear.bias, patches, patch_norm)
