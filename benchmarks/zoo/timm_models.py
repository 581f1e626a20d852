"""Models of timm: name (or module and class), variant, side of the image, arguments that make it small."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from zoo.case import Case
from zoo.entries import Entry, alike

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL_VIT = {**VIT, "img_size": 64, "patch_size": 16}
STAGES = {"depths": (1, 1, 1, 1)}

TIMM: list[Entry] = [
    ("vit_tiny_patch16_224", "", 64, SMALL_VIT),
    ("vit_tiny_patch16_224", "qk_norm", 64, {**SMALL_VIT, "qk_norm": True}),
    ("vit_tiny_patch16_224", "no bias", 64, {**SMALL_VIT, "qkv_bias": False, "proj_bias": False}),
    ("vit_tiny_patch16_224", "layer scale, registers", 64, {**SMALL_VIT, "init_values": 1e-5, "reg_tokens": 4}),
    ("vit_tiny_patch16_224", "rectangular", 64, {**SMALL_VIT, "patch_size": (16, 8)}),
    ("vit_tiny_patch16_224", "dynamic image size", 64, {**SMALL_VIT, "dynamic_img_size": True}),
    (
        "vit_tiny_patch16_224",
        "padded image",
        60,
        {**SMALL_VIT, "img_size": 60, "dynamic_img_size": True, "dynamic_img_pad": True},
    ),
    ("vit_tiny_patch16_224", "average pool", 64, {**SMALL_VIT, "class_token": False, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", "map pool", 64, {**SMALL_VIT, "class_token": False, "global_pool": "map"}),
    *alike(
        64, SMALL_VIT,
        "vit_betwixt_patch16_reg4_gap_256", "vit_wee_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256",
        "vit_dpwee_patch16_reg1_gap_256", "vit_dlittle_patch16_reg1_gap_256", "vit_small_patch16_18x2_224",
        "vit_base_patch16_siglip_224", "vit_base_patch16_clip_quickgelu_224", "vit_intern300m_patch14_448",
        "vit_giant_patch14_dinov2", "aimv2_large_patch14_224", "beit3_base_patch16_224",
    ),
    ("vit_tiny_r_s16_p8_224", "", 64, {**VIT, "img_size": 64}),
    *alike(160, {}, "test_vit", "test_vit2", "test_vit3", "test_vit4"),
    *alike(
        64, SMALL_VIT,
        "vit_relpos_small_patch16_224", "vit_relpos_base_patch16_cls_224", "vit_relpos_base_patch16_clsgap_224",
        "vit_relpos_small_patch16_rpn_224", "vit_srelpos_small_patch16_224", "flexivit_small",
    ),
    ("naflexvit_base_patch16_gap", "", 64, VIT),
    ("naflexvit_base_patch16_map", "", 64, VIT),
    *alike(
        64, SMALL_VIT,
        "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "cait_xxs24_224",
        "beit_base_patch16_224",
    ),
    (
        "beit_base_patch16_224",
        "shared bias",
        64,
        {**SMALL_VIT, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    *alike(
        64, SMALL_VIT,
        "beitv2_base_patch16_224", "eva_giant_patch14_224", "eva02_tiny_patch14_224", "eva02_base_patch14_224",
        "vit_medium_patch16_rope_reg1_gap_256", "vit_small_patch16_rope_mixed_ape_224",
        "vit_pe_core_tiny_patch16_384", "vit_small_patch16_dinov3", "vit_7b_patch16_dinov3",
    ),
    ("samvit_base_patch16", "", 128, {**SMALL_VIT, "img_size": 128, "window_size": 3, "global_attn_indexes": (1,)}),
    ("vitamin_small_224", "", 64, {"img_size": 64, "depth": 2}),
    ("gemma4_vit_167m", "", 64, VIT),
    ("qwen3_vit_88m", "", 64, VIT),
    ("deepseek_vit_412m", "", 56, VIT),
    ("swin_tiny_patch4_window7_224", "", 64, {**STAGES, "img_size": 64, "embed_dim": 24, "window_size": 4}),
    (
        "swin_tiny_patch4_window7_224",
        "two blocks",
        112,
        {"depths": (2, 2), "num_heads": (3, 6), "img_size": 112, "embed_dim": 24},
    ),
    (
        "swin_tiny_patch4_window7_224",
        "padded",
        72,
        {"depths": (2, 2), "num_heads": (3, 6), "img_size": 72, "embed_dim": 24},
    ),
    ("swin_s3_tiny_224", "", 224, {"embed_dim": 24, "depths": (2, 1, 2, 1)}),
    *alike(
        64, {"depths": (2, 2, 1, 1), "img_size": 64, "embed_dim": 24, "window_size": 4},
        "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "swinv2_cr_tiny_ns_224",
    ),
    ("pvt_v2_b0", "", 64, STAGES),
    ("pvt_v2_b2_li", "", 64, {**STAGES, "embed_dims": (16, 32, 40, 64)}),
    ("twins_pcpvt_small", "", 64, {"img_size": 64, **STAGES}),
    ("twins_svt_small", "", 224, {"depths": (2, 2, 2, 1)}),
    ("crossvit_9_240", "", 240, {"depth": ((1, 1, 0),)}),
    ("crossvit_9_dagger_240", "", 240, {"depth": ((1, 1, 0),)}),
    ("coat_lite_tiny", "", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1)}),
    ("coat_tiny", "", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    *alike(
        64, {"img_size": 64},
        "coatnet_pico_rw_224", "coatnet_nano_cc_224", "coatnet_bn_0_rw_224", "coatnext_nano_rw_224",
        "maxvit_pico_rw_256", "maxvit_rmlp_pico_rw_256", "maxvit_tiny_pm_256",
    ),
    ("maxvit_tiny_tf_224", "", 224, {"img_size": 224}),
    ("maxxvit_rmlp_nano_rw_256", "", 64, {"img_size": 64}),
    ("maxxvitv2_nano_rw_256", "", 64, {"img_size": 64}),
    ("levit_128s", "", 224, {}),
    ("levit_conv_128s", "", 224, {}),
    ("tnt_s_patch16_224", "", 64, {"img_size": 64, "depth": 2}),
    ("tnt_s_legacy_patch16_224", "", 64, {"img_size": 64, "depth": 2}),
    ("visformer_tiny", "", 64, {"img_size": 64, "depth": (2, 2, 2)}),
    (
        "volo.VOLO",
        "",
        64,
        {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 3, 3, 3)},
    ),
    ("xcit_nano_12_p16_224", "", 64, {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}),
    ("xcit_tiny_12_p8_224", "", 64, {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}),
    ("mvitv2_tiny", "", 64, {"img_size": (64, 64)}),
    ("mvitv2_base_cls", "", 64, {"img_size": (64, 64)}),
    ("pit_ti_224", "", 64, {"img_size": 64, "depth": (1, 2, 1)}),
    ("pit_s_distilled_224", "", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    (
        "nest.Nest",
        "",
        64,
        {"img_size": 64, "num_levels": 2, "embed_dims": (24, 48), "num_heads": (2, 4), "depths": (1, 2)},
    ),
    (
        "gcvit.GlobalContextVit",
        "",
        64,
        {
            "img_size": 64,
            "embed_dim": 16,
            "depths": (2, 2, 2, 2),
            "num_heads": (1, 2, 4, 8),
            "window_ratio": (16, 16, 16, 32),
        },
    ),
    ("gcvit_xxtiny", "", 224, {}),
    ("davit_tiny", "", 64, STAGES),
    ("edgenext_xx_small", "", 64, {"depths": (1, 2, 2, 2)}),
    ("edgenext_small_rw", "", 64, {"depths": (1, 2, 2, 2)}),
    ("efficientformer_l1", "", 224, {"depths": (1, 1, 1, 2)}),
    ("efficientformerv2_s0", "", 224, {"depths": (1, 1, 3, 3)}),
    ("fastvit_sa12", "", 64, {"layers": (1, 1, 1, 2)}),
    ("fastvit_mci0", "", 64, {"layers": (1, 1, 1, 2)}),
    ("vit_base_mci_224", "", 64, {"depth": 2, "img_size": 64}),
    ("hiera_tiny_224", "", 224, {"embed_dim": 24, "stages": (1, 1, 2, 1)}),
    ("hiera_small_abswin_256", "", 256, {"embed_dim": 24, "stages": (1, 1, 2, 1)}),
    ("hieradet_small", "", 256, {"embed_dim": 24, "stages": (1, 1, 3, 1), "global_att_blocks": (3,)}),
    ("sam2_hiera_tiny", "", 256, {"embed_dim": 24, "stages": (1, 1, 3, 1), "global_att_blocks": (3,)}),
    *alike(
        64, {},
        "mobilevit_xxs", "mobilevitv2_050", "mobilenetv4_hybrid_medium", "mobilenetv5_base", "poolformer_s12",
        "caformer_s18", "convformer_s18",
    ),
    ("nextvit_small", "", 64, {"depths": (1, 2, 5, 2)}),
    ("repvit_m0_9", "", 64, {}),
    ("rdnet_tiny", "", 64, {}),
    ("sequencer2d_s", "", 64, {"layers": (1, 1, 1, 1), "img_size": 64}),
    ("tiny_vit_5m_224", "", 224, {"depths": (1, 1, 2, 1)}),
    ("tiny_vit_5m_224", "padded", 96, {"depths": (1, 1, 2, 1)}),
    ("efficientvit_m0", "", 224, {}),
    *alike(64, {}, "efficientvit_b0", "efficientvit_l1", "efficientvim_m1"),
    ("convit_tiny", "", 64, {"img_size": 64, "depth": 3, "local_up_to_layer": 2}),
    ("botnet26t_256", "", 64, {"img_size": 64}),
    ("eca_botnext26ts_256", "", 64, {"img_size": 64}),
    ("halonet26t", "", 256, {}),
    ("sehalonet33ts", "", 256, {}),
    ("lambda_resnet26t", "", 64, {}),
    ("lambda_resnet26rpt_256", "", 64, {"img_size": 64}),
    ("haloregnetz_b", "", 224, {}),
    ("bat_resnext26ts", "", 256, {}),
    *alike(64, {}, "gcresnet33ts", "starnet_s050", "iformer_t"),
    ("shvit_s1", "", 128, {}),
    ("lowformer_b0", "", 64, {}),
    ("cpubone_b0_bfrobust", "", 64, {}),
    ("csatv2", "", 512, {}),
    ("focalnet_tiny_srf", "", 64, {}),
    ("swiftformer_xs", "", 64, {}),
    *alike(64, {"img_size": 64}, "mixer_s32_224", "gmlp_ti16_224", "gmixer_12_224", "resmlp_12_224"),
    *alike(64, STAGES, "mambaout_femto", "convnext_atto", "inception_next_atto"),
    ("resnet50_clip", "", 64, {}),
]  # fmt: skip


def timm_cases() -> list[Case]:
    def case(name: str, variant: str, side: int, options: dict[str, Any]) -> Case:
        def build() -> nn.Module:
            module, _, model_class = name.rpartition(".")
            if module:
                return getattr(importlib.import_module(f"timm.models.{module}"), model_class)(num_classes=10, **options)
            return importlib.import_module("timm").create_model(name, num_classes=10, **options)

        return Case(f"timm:{name}" + (f" ({variant})" if variant else ""), build, (3, side, side))

    return [case(*entry) for entry in TIMM]
