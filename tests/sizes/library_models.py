"""Small models of three libraries that take images of any size, without any dropout."""

from __future__ import annotations

import timm
import torchvision
import transformers


def timm_vit(**options):
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | options
    return timm.models.vision_transformer.VisionTransformer(**{"dynamic_img_size": True} | options)


def timm_pvt(**options):
    return timm.create_model("pvt_v2_b0", **{"depths": (1, 1, 1, 1), "num_classes": 5, "drop_path_rate": 0.0} | options)


def timm_swin(**options):
    options = {"img_size": 64, "window_size": 4, "depths": (1, 1, 2), "num_heads": (1, 2, 4), "embed_dim": 16} | options
    options = {"num_classes": 5, "drop_path_rate": 0.0, "strict_img_size": False, "always_partition": True} | options
    return timm.create_model("swin_tiny_patch4_window7_224", **options)


def torchvision_swin(**options):
    options = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": [4, 4]} | options
    return torchvision.models.SwinTransformer([4, 4], **{"num_classes": 5, "stochastic_depth_prob": 0.0} | options)


def transformers_swin(**options):
    options = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4} | options
    config = transformers.SwinConfig(**{"patch_size": 4, "drop_path_rate": 0.0, "num_labels": 5} | options)
    return transformers.SwinForImageClassification(config)


def transformers_segformer(**options):
    options = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]} | options
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0} | options
    config = transformers.SegformerConfig(**{"classifier_dropout_prob": 0.0, "num_labels": 5} | options)
    return transformers.SegformerForImageClassification(config)
