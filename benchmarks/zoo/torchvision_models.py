"""Models of torchvision."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from zoo.case import Case


def torchvision_cases() -> list[Case]:
    def swin(block: str, side: int) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            swin_module = importlib.import_module("torchvision.models.swin_transformer")
            merging = swin_module.PatchMergingV2 if block.endswith("V2") else swin_module.PatchMerging
            return swin_module.SwinTransformer(
                [4, 4], 24, [2, 2], [3, 6], [side, side], num_classes=10,
                block=getattr(swin_module, block), downsample_layer=merging,
            )  # fmt: skip

        return build

    def vit() -> nn.Module:
        vision_transformer = importlib.import_module("torchvision.models.vision_transformer")
        return vision_transformer.VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=10)

    def maxvit() -> nn.Module:
        maxvit_module = importlib.import_module("torchvision.models.maxvit")
        return maxvit_module.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)

    return [
        Case("torchvision:vit", vit, (3, 64, 64)),
        Case("torchvision:swin", swin("SwinTransformerBlock", 4), (3, 64, 64)),
        Case("torchvision:swin (padded)", swin("SwinTransformerBlock", 7), (3, 64, 64)),
        Case("torchvision:swin_v2", swin("SwinTransformerBlockV2", 4), (3, 64, 64)),
        Case("torchvision:swin_v2 (padded)", swin("SwinTransformerBlockV2", 7), (3, 64, 64)),
        Case("torchvision:maxvit", maxvit, (3, 64, 64)),
    ]
