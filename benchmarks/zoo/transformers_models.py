"""Models of transformers: class, variant, side of the image, what its configuration is reduced to."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from zoo.case import Case
from zoo.entries import Entry, alike

HF_VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
}
HF_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4, "image_size": 64}
HF_ONE = {"depths": [1, 1, 1, 1]}
HF_PATCHES = {**HF_VIT, "patch_size": 16}
HF_TWO_SIDES = {**HF_VIT, "image_size": [64, 64], "patch_size": [16, 16]}
HF_SAM = {**HF_PATCHES, "global_attn_indexes": [1], "window_size": 3, "output_channels": 16}
HF_FRAMES = {**HF_PATCHES, "num_frames": 4}

TRANSFORMERS: list[Entry] = [
    ("ViTForImageClassification", "sdpa", 64, {**HF_VIT, "attn_implementation": "sdpa"}),
    ("ViTForImageClassification", "eager", 64, {**HF_VIT, "attn_implementation": "eager"}),
    *alike(64, HF_VIT, "ViTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    ("BeitForImageClassification", "", 64, {**HF_VIT, "use_relative_position_bias": True}),
    ("BeitForImageClassification", "shared bias", 64, {**HF_VIT, "use_shared_relative_position_bias": True}),
    ("Data2VecVisionForImageClassification", "", 64, {**HF_VIT, "use_relative_position_bias": True}),
    ("Dinov2ForImageClassification", "", 64, {**HF_VIT, "patch_size": 16}),
    ("Dinov2ForImageClassification", "swiglu", 64, {**HF_VIT, "patch_size": 16, "use_swiglu_ffn": True}),
    ("Dinov2WithRegistersForImageClassification", "", 64, {**HF_VIT, "patch_size": 16}),
    ("DINOv3ViTModel", "", 64, {**HF_VIT, "num_register_tokens": 4}),
    ("IJepaForImageClassification", "", 64, HF_VIT),
    ("ViTMSNForImageClassification", "", 64, HF_VIT),
    ("ViTMAEModel", "", 64, {**HF_VIT, "mask_ratio": 0.0}),
    (
        "VitDetModel",
        "",
        64,
        {**HF_VIT, "use_relative_position_embeddings": True, "window_block_indices": [0], "window_size": 3},
    ),
    ("YolosForObjectDetection", "", 64, {**HF_VIT, "image_size": [64, 64], "num_detection_tokens": 5}),
    (
        "DPTForSemanticSegmentation",
        "",
        64,
        {
            **HF_VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
        },
    ),
    ("CLIPVisionModel", "", 64, {**HF_VIT, "patch_size": 16}),
    ("SiglipVisionModel", "", 64, HF_VIT),
    ("Aimv2VisionModel", "", 64, {**HF_VIT, "patch_size": 16}),
    ("SwinForImageClassification", "sdpa", 64, {**HF_SWIN, "attn_implementation": "sdpa"}),
    ("SwinForImageClassification", "eager", 64, {**HF_SWIN, "attn_implementation": "eager"}),
    ("SwinForImageClassification", "padded", 64, {**HF_SWIN, "window_size": 7}),
    ("Swinv2ForImageClassification", "", 64, HF_SWIN),
    ("Swinv2ForImageClassification", "padded", 64, {**HF_SWIN, "window_size": 7}),
    ("DonutSwinForImageClassification", "", 64, HF_SWIN),
    ("FocalNetForImageClassification", "", 64, {"embed_dim": 24, "depths": [1, 1, 1, 1], "image_size": 64}),
    ("PvtForImageClassification", "", 64, {**HF_ONE, "image_size": 64}),
    ("PvtV2ForImageClassification", "", 64, {**HF_ONE, "image_size": 64}),
    ("PvtV2ForImageClassification", "linear", 64, {**HF_ONE, "image_size": 64, "linear_attention": True}),
    *alike(64, HF_ONE, "SegformerForImageClassification", "SegformerForSemanticSegmentation", "GLPNForDepthEstimation"),
    ("CvtForImageClassification", "", 64, {"depth": [1, 2, 3]}),
    ("LevitForImageClassification", "", 224, {"depths": [1, 1, 1]}),
    ("MobileViTForImageClassification", "", 64, {"image_size": 64}),
    ("MobileViTV2ForImageClassification", "", 64, {"image_size": 64, "width_multiplier": 0.5}),
    ("PoolFormerForImageClassification", "", 64, HF_ONE),
    ("SwiftFormerForImageClassification", "", 224, HF_ONE),
    ("HieraForImageClassification", "", 224, {**HF_ONE, "embed_dim": 24, "num_heads": [1, 2, 4, 8]}),
    ("Sam2HieraDetModel", "", 256, {}),
    ("PoolFormerModel", "", 64, HF_ONE),
    ("ConvNextForImageClassification", "", 64, HF_ONE),
    *alike(64, HF_PATCHES, "PixtralVisionModel", "BlipVisionModel", "GitVisionModel", "OwlViTVisionModel"),
    ("InternVLVisionModel", "", 64, HF_TWO_SIDES),
    *alike(
        64, HF_PATCHES,
        "JanusVisionModel", "MLCDVisionModel", "FlavaImageModel", "Sapiens2Model", "PixioModel", "RadioModel",
    ),
    ("VitPoseBackbone", "", 64, {**HF_TWO_SIDES, "out_features": ["stage2"]}),
    ("MgpstrModel", "", 64, {**HF_PATCHES, "image_size": [64, 64]}),
    ("MaskFormerSwinModel", "", 64, HF_SWIN),
    ("Swin2SRModel", "", 64, {**HF_SWIN, "num_heads": [3, 3]}),
    ("SamVisionModel", "", 64, HF_SAM),
    ("LwDetrViTBackbone", "", 64, {**HF_PATCHES, "window_block_indices": [0], "out_features": ["stage2"]}),
    *alike(64, HF_FRAMES, "TimesformerModel", "VivitModel", "VideoMAEModel"),
]  # fmt: skip


def transformers_cases() -> list[Case]:
    def case(name: str, variant: str, side: int, options: dict[str, Any]) -> Case:
        def build() -> nn.Module:
            transformers = importlib.import_module("transformers")
            model = getattr(transformers, name)
            chosen = dict(options)
            implementation = chosen.pop("attn_implementation", None)
            config = model.config_class(**chosen)
            config.num_labels = 10
            return model._from_config(config, **({"attn_implementation": implementation} if implementation else {}))

        frames = (options["num_frames"],) if "num_frames" in options else ()
        return Case(f"transformers:{name}" + (f" ({variant})" if variant else ""), build, (*frames, 3, side, side))

    return [case(*entry) for entry in TRANSFORMERS]
