"""Small converted models, for other people's code around them."""

from __future__ import annotations

import timm
import torch
import transformers

import attnrewrite

IMAGE = (32, 32)


def vit(**options):
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**(settings | options))


def swin(**options):
    settings = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2)}
    settings |= {"num_heads": (2, 4), "num_classes": 5}
    return timm.models.swin_transformer.SwinTransformer(**(settings | options))


def transformers_vit(**options):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**(settings | {"image_size": 32, "patch_size": 4, "num_labels": 5} | options))
    return transformers.ViTForImageClassification(config)


CONVERSIONS = [
    (vit, "neighborhood", {"kernel_size": 3}),
    (swin, "neighborhood", {"kernel_size": 3}),
    (vit, "aggregated", {}),
    (swin, "conv_glu", {}),
    (transformers_vit, "neighborhood", {"kernel_size": 3}),
]


def converted_model(make, to, options, **settings):
    torch.manual_seed(0)
    return attnrewrite.convert(make(**settings).eval(), to, torch.randn(1, 3, *IMAGE), progress=False, **options)


def logits(output):
    return getattr(output, "logits", output)


def batches(count=3, size=4):
    """Images whose class shows in their mean, so that a few steps help."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        labels = torch.randint(5, (size,), generator=generator)
        images = torch.randn(size, 3, *IMAGE, generator=generator) * 0.1 + labels.view(-1, 1, 1, 1) / 4
        yield images, labels
