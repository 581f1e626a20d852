"""Layer norm and linear layer of overlapping patches, as the operator that never gathers them."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import soft_split
from ..operators.soft_split import PatchGrid


def project_patches(image: Tensor, norm: nn.Module, linear: nn.Linear, patches: PatchGrid) -> Tensor:
    """``linear(norm(patch))`` for every patch of an image; see ``functional.soft_split``.

    Args:
        image: ``[B, C, H, W]``.
        norm: ``nn.LayerNorm`` over a patch's ``C * kernel_size ** 2`` values, or ``nn.Identity``.
        linear: from those values.
        patches: the patches.

    Returns:
        ``[B, H', W', linear.out_features]``, contiguous, in the dtype of the weights (also under autocast).
    """
    sizes = (patches.kernel_size, patches.stride, patches.padding)
    if not isinstance(norm, nn.LayerNorm):
        return soft_split(image, linear.weight, linear.bias, *sizes)
    return soft_split(
        image, linear.weight, linear.bias, *sizes, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps
    )
